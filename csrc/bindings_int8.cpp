// int8 layers for Python: fastkd/native/int8_*.py are the callers.
#include "bindings_int8.h"

#include <atomic>
#include <cmath>

#include "cpu/int8_layers.h"
#include "cpu/int8_winograd.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "numbers.h"

namespace py = pybind11;

namespace fastkd {
namespace {

Packing packing(Numbers& numbers) {
    Int8Shape shape;
    shape.channels = numbers.integer(), shape.terms = numbers.integer();
    shape.taps = numbers.integer(), shape.groups = numbers.integer(), shape.width = numbers.integer();
    Numbers::check();
    return Packing(shape, active_instruction_set().int8.layout);
}

Int8Layer layer(Numbers& numbers) {
    Int8Layer l;
    l.input = numbers.address<void>(), l.residual = numbers.address<void>();
    l.output = const_cast<void*>(numbers.address<void>()), l.threads = static_cast<int>(numbers.integer());
    l.dtype = static_cast<Dtype>(numbers.integer()), l.given = numbers.address<float>();
    l.packed = numbers.address<char>(), l.scale = numbers.address<float>(), l.bias = numbers.address<float>();
    l.activation = static_cast<Activation>(numbers.integer());
    return l;
}

Int8Matrix matrix(Numbers& numbers) {
    Int8Matrix m;
    m.rows = numbers.integer(), m.stride = numbers.integer(), m.residual_stride = numbers.integer();
    Numbers::check();
    return m;
}

Int8Images images(Numbers& numbers) {
    Int8Images i;
    i.count = numbers.integer(), i.height = numbers.integer(), i.width = numbers.integer(), i.planes = numbers.integer();
    for (int64_t(*pair)[2] : {&i.kernel, &i.stride, &i.padding, &i.dilation}) {
        for (int64_t& number : *pair) number = numbers.integer();
    }
    Numbers::check();
    return i;
}

bool is_wrong(const float* given) { return given && !(*given > 0 && std::isfinite(*given)); }

int64_t packed_bytes(const py::tuple& shape) {
    Numbers numbers(shape);
    return packing(numbers).bytes();
}

void pack(const py::tuple& shape, Address weight, Address packed, int threads) {
    Numbers numbers(shape);
    const Packing p = packing(numbers);
    const py::gil_scoped_release release;
    int8_pack(p, reinterpret_cast<const int8_t*>(weight), reinterpret_cast<char*>(packed), threads);
}

// These return whether the input's step, if there is one, is a number; where it is not, nothing was computed.
bool linear(const py::tuple& shape, const py::tuple& what) {
    Numbers dimensions(shape), numbers(what);
    const Packing p = packing(dimensions);
    const Int8Layer l = layer(numbers);
    const Int8Matrix m = matrix(numbers);
    if (is_wrong(l.given)) return false;
    const py::gil_scoped_release release;
    int8_linear(l, m, p);
    return true;
}

bool weight_only(const py::tuple& shape, const py::tuple& what) {
    Numbers dimensions(shape), numbers(what);
    const Packing p = packing(dimensions);
    const Int8Layer l = layer(numbers);
    const Int8Matrix m = matrix(numbers);
    const py::gil_scoped_release release;
    int8_weight_only(l, m, p);
    return true;
}

bool winograd_pays(const py::tuple& shape, const py::tuple& what, int threads) {
    Numbers dimensions(shape), numbers(what);
    const Packing p = packing(dimensions);
    return int8_winograd_pays(images(numbers), p, threads);
}

int64_t winograd_bytes(const py::tuple& shape) {
    Numbers numbers(shape);
    return WinogradPacking(packing(numbers)).bytes;
}

bool winograd_pack(const py::tuple& shape, Address weight, Address packed, int threads) {
    Numbers numbers(shape);
    const Packing p = packing(numbers);
    const py::gil_scoped_release release;
    return int8_winograd_pack(p, reinterpret_cast<const int8_t*>(weight), reinterpret_cast<char*>(packed), threads);
}

template <void (*compute)(const Int8Layer&, const Int8Images&, const Packing&)>
bool conv2d(const py::tuple& shape, const py::tuple& what) {
    Numbers dimensions(shape), numbers(what);
    const Packing p = packing(dimensions);
    const Int8Layer l = layer(numbers);
    const Int8Images i = images(numbers);
    if (is_wrong(l.given)) return false;
    const py::gil_scoped_release release;
    compute(l, i, p);
    return true;
}

// Of the first id that is no row, where it is; the number of ids, if there is none.
int64_t embedding(Address weight, Address scale, int64_t rows, int64_t columns, Address ids, int64_t count, Address output,
                  int dtype, int threads) {
    const Int8Table table{reinterpret_cast<const int8_t*>(weight), reinterpret_cast<const float*>(scale), rows, columns};
    const int64_t* first = reinterpret_cast<const int64_t*>(ids);
    const py::gil_scoped_release release;
    const int64_t wrong = find_outside(first, count, rows);
    if (wrong == count) int8_embedding(table, first, count, reinterpret_cast<void*>(output), static_cast<Dtype>(dtype), threads);
    return wrong;
}

// For the benches: products in registers alone, as many on each thread.
int64_t peak(int64_t rounds, int threads) {
    constexpr int64_t kEnough = 1 << 20;  // for a thread of its own
    const py::gil_scoped_release release;
    std::atomic<int64_t> products{0};
    for_each_chunk(threads, kEnough, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) products += active_instruction_set().int8.peak(rounds);
    });
    return products;
}

}  // namespace

void bind_int8(py::module_& m) {
    m.def("int8_packed_bytes", &packed_bytes);
    m.def("int8_pack", &pack);
    m.def("int8_linear", &linear);
    m.def("int8_conv2d", &conv2d<int8_conv2d>);
    m.def("int8_winograd_pays", &winograd_pays);
    m.def("int8_winograd_bytes", &winograd_bytes);
    m.def("int8_winograd_pack", &winograd_pack);
    m.def("int8_winograd", &conv2d<int8_winograd>);
    m.def("int8_weight_only", &weight_only);
    m.def("int8_embedding", &embedding);
    m.def("int8_peak", &peak);
}

}  // namespace fastkd
