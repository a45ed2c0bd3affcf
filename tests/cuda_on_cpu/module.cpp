// fastkd's CUDA functions as a Python module that needs no GPU, and the controls of the machine that runs them.
#include <pybind11/stl.h>

#include "../../csrc/bindings_cuda.h"
#include "faults.h"
#include "watch.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
    using namespace fastkd_machine;
    fastkd::cuda::bind(m);
    m.def("add_buffer", &watch::add_buffer);
    m.def("forget", &watch::forget);
    m.def("reports", &watch::reports);
    m.def("launches", [] { return watch::launches; });
    m.def("shuffle", [](unsigned seed) { watch::seed = seed; });
    m.def("run_fault", &faults::run);
    m.def("fail_at", [](int64_t launch) { watch::fails_at = launch; });
}
