// The CUDA kernels on addresses, and the stream that they go to as a number. No header of CUDA's is included.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/int8.h"
#include "cuda/pairs.h"

namespace fastkd::cuda {

using Address = uintptr_t;

template <class T>
inline T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline void check(int error, const char* kernels) {
    if (error == 0) return;
    throw std::runtime_error(std::string("fastkd: ") + kernels + ": " + error_name(error) + " (" + error_text(error) + ")");
}

// (student, teacher, sum of the student, sum of the teacher)
inline SquaredDistances squares_of(const pybind11::tuple& where, int64_t n, double coincident) {
    const auto number = [&](int i) { return at<const double>(where[i].cast<Address>()); };
    return {number(0), number(1), number(2), number(3), n, coincident};
}

// (rows, squares of their lengths, how many)
inline Rows rows_of(const pybind11::tuple& rows) {
    return {at<const double>(rows[0].cast<Address>()), at<const double>(rows[1].cast<Address>()), rows[2].cast<int64_t>()};
}

// Addresses and numbers, laid out by fastkd/native/_int8_cuda.py.
inline Int8Linear int8_linear_of(const pybind11::tuple& numbers) {
    size_t next = 0;
    const auto number = [&] { return numbers[next++].cast<int64_t>(); };
    const auto address = [&] { return numbers[next++].cast<Address>(); };
    Int8Linear l;
    l.input = at<const void>(address());
    l.rows = number(), l.terms = number(), l.columns = number(), l.stride = number();
    l.dtype = static_cast<Dtype>(number());
    l.given = at<const float>(address()), l.weight = at<const int8_t>(address());
    l.scale = at<const float>(address()), l.bias = at<const float>(address());
    l.residual = at<const void>(address()), l.residual_stride = number();
    l.output = at<void>(address()), l.activation = static_cast<Activation>(number());
    return l;
}

inline void bind(pybind11::module_& m) {
    m.def("cuda_device_count", &device_count);
    m.def("cuda_squared_distances", [](Address products, const pybind11::tuple& x, const pybind11::tuple& y, int64_t d, bool own,
                                       Address squares, Address stream) {
        check(squared_distances(at<double>(products), rows_of(x), rows_of(y), d, own, at<double>(squares), at<void>(stream)),
              "squared distances");
    });
    m.def("cuda_pull", [](Address weights, Address x, int64_t n, Address y, int64_t m, int64_t d, Address out, Address stream) {
        check(pull(at<double>(weights), at<double>(x), n, at<double>(y), m, d, at<double>(out), at<void>(stream)), "pull");
    });
    m.def("cuda_distance_loss_scratch", &distance_loss_scratch);
    m.def("cuda_distance_loss", [](const pybind11::tuple& squares, int64_t n, double coincident, double delta, Address loss, Address slopes,
                                   Address scratch, Address stream) {
        check(distance_loss(squares_of(squares, n, coincident), delta, at<double>(loss), at<double>(slopes), at<void>(scratch),
                            at<void>(stream)),
              "distance loss");
    });
    m.def("cuda_angle_loss_scratch", &angle_loss_scratch);
    m.def("cuda_angle_loss", [](const pybind11::tuple& squares, int64_t n, double coincident, double delta, Address loss, Address slopes,
                                int64_t slab_bytes, Address scratch, Address stream) {
        check(angle_loss(squares_of(squares, n, coincident), delta, at<double>(loss), at<double>(slopes), slab_bytes,
                         at<void>(scratch), at<void>(stream)),
              "angle loss");
    });
    m.def("cuda_int8_linear_scratch", &int8_linear_scratch);
    m.def("cuda_int8_linear", [](const pybind11::tuple& numbers, int64_t processors, Address scratch, Address stream) {
        check(int8_linear(int8_linear_of(numbers), processors, at<void>(scratch), at<void>(stream)), "int8 linear");
    });
}

}  // namespace fastkd::cuda
