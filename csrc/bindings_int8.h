#pragma once
#include <pybind11/pybind11.h>

namespace fastkd {

void bind_int8(pybind11::module_&);

}  // namespace fastkd
