// What Python hands to the bindings.
#pragma once
#include <pybind11/pybind11.h>

#include "cpu/attention_rows.h"
#include "cpu/logit_rows.h"

namespace fastkd {

using Address = uintptr_t;

// Takes a tuple of numbers apart. A call on a few rows is over in 2 us; converting as many arguments one by one would take
// longer than that.
class Numbers {
  public:
    explicit Numbers(const pybind11::tuple& tuple) : tuple_(tuple.ptr()), size_(PyTuple_GET_SIZE(tuple.ptr())) {}

    int64_t integer() { return PyLong_AsLongLong(item()); }
    double real() { return PyFloat_AsDouble(item()); }
    template <class T>
    const T* address() {
        return reinterpret_cast<const T*>(static_cast<Address>(PyLong_AsUnsignedLongLong(item())));
    }
    ByRow by_row() {
        const float* data = address<float>();
        const int64_t stride = integer();
        return {data, stride, real()};
    }
    Heads heads() {
        const void* data = address<void>();
        const int64_t batch = integer(), head = integer(), token = integer();
        const Dtype dtype = static_cast<Dtype>(integer());
        const int64_t heads = integer();
        return {data, batch, head, token, dtype, heads, integer()};
    }
    bool more() const { return next_ < size_; }
    static void check() {
        if (PyErr_Occurred()) throw pybind11::error_already_set();
    }

  private:
    PyObject* item() {
        if (next_ >= size_) throw pybind11::value_error("fastkd._C: too few numbers");
        return PyTuple_GET_ITEM(tuple_, next_++);
    }
    PyObject* tuple_;
    Py_ssize_t size_, next_ = 0;
};

}  // namespace fastkd
