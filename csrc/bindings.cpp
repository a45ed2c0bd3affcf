// The extension's module. It knows no torch: addresses, sizes and numbers come in, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/logit_rows.h"
#ifdef FASTKD_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace fastkd {
namespace {

using Address = uintptr_t;
using MatrixTuple = std::tuple<Address, int64_t, int>;             // address, stride, dtype
using ByRowTuple = std::tuple<Address, int64_t, double>;           // address or 0, stride, the number without one

Matrix matrix(const MatrixTuple& m) {
    return {reinterpret_cast<const void*>(std::get<0>(m)), std::get<1>(m), static_cast<Dtype>(std::get<2>(m))};
}

ByRow by_row(const ByRowTuple& b) {
    return {reinterpret_cast<const float*>(std::get<0>(b)), std::get<1>(b), std::get<2>(b)};
}

std::vector<ByRow> by_row(const std::vector<ByRowTuple>& list) {
    std::vector<ByRow> result;
    for (const ByRowTuple& one : list) result.push_back(by_row(one));
    return result;
}

std::unique_ptr<LogitProblem> problem(const MatrixTuple& student, const std::vector<MatrixTuple>& teachers, int64_t rows,
                                      int64_t vocabulary, int64_t shared, Address target, int64_t ignore_index,
                                      const ByRowTuple& row_weight, const ByRowTuple& alpha, const ByRowTuple& temperature,
                                      const std::vector<ByRowTuple>& teacher_temperature,
                                      const std::vector<ByRowTuple>& teacher_weight, int divergence, double beta,
                                      bool scale_by_t2, double label_smoothing, double z_loss, bool agreement, int threads) {
    auto p = std::make_unique<LogitProblem>();
    p->student = matrix(student);
    for (const MatrixTuple& teacher : teachers) p->teachers.push_back(matrix(teacher));
    p->rows = rows, p->vocabulary = vocabulary, p->shared = shared;
    p->target = reinterpret_cast<const int64_t*>(target), p->ignore_index = ignore_index;
    p->row_weight = by_row(row_weight), p->alpha = by_row(alpha), p->temperature = by_row(temperature);
    p->teacher_temperature = by_row(teacher_temperature), p->teacher_weight = by_row(teacher_weight);
    p->divergence = static_cast<Divergence>(divergence), p->beta = static_cast<float>(beta);
    p->scale_by_t2 = scale_by_t2, p->label_smoothing = label_smoothing;
    p->z_loss = z_loss, p->agreement = agreement, p->threads = threads;
    return p;
}

// Returns (kind, got) of what is wrong in the data, and then computes nothing.
std::tuple<int, double> forward(const LogitProblem& p, bool reduce, double divisor, Address loss, Address state, Address scale) {
    const py::gil_scoped_release release;
    const Fault fault = find_fault(p);
    if (fault.kind != Fault::none) return {fault.kind, fault.got};
    logit_forward(p, reduce, divisor, reinterpret_cast<float*>(loss), reinterpret_cast<double*>(state),
                  reinterpret_cast<double*>(scale));
    return {Fault::none, 0};
}

void backward(const LogitProblem& p, Address state, const ByRowTuple& upstream, Address grad, int64_t stride, bool fresh) {
    const py::gil_scoped_release release;
    logit_backward(p, reinterpret_cast<const double*>(state), by_row(upstream), reinterpret_cast<void*>(grad), stride, fresh);
}

}  // namespace
}  // namespace fastkd

PYBIND11_MODULE(_C, m) {
    using namespace fastkd;
    m.doc() = "CPU and CUDA kernels on addresses; fastkd.native and fastkd._dispatch are its callers.";
    m.def("instruction_set", [] { return active_instruction_set().name; });
    py::class_<LogitProblem>(m, "LogitProblem").def(py::init(&problem));
    m.def("logit_forward", &forward);
    m.def("logit_backward", &backward);
#ifdef FASTKD_WITH_CUDA
    m.attr("cuda_architectures") = FASTKD_WITH_CUDA;
    m.def("cuda_device_count", &cuda_device_count);
#else
    m.attr("cuda_architectures") = "";
#endif
}
