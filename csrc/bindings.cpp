// The extension's module. It knows no torch: addresses, sizes and numbers come in, so one build serves every torch.
#include <pybind11/pybind11.h>

#include "bindings_int8.h"
#include "cpu/attention_rows.h"
#include "cpu/feature_rows.h"
#include "cpu/isa.h"
#include "cpu/logit_rows.h"
#include "cpu/matmul_panels.h"
#include "cpu/pairs_matrix.h"
#include "cpu/similarity_rows.h"
#include "cpu/topk_rows.h"
#include "numbers.h"
#ifdef FASTKD_WITH_CUDA
#include "bindings_cuda.h"
#endif

namespace py = pybind11;

namespace fastkd {
namespace {

// A problem in two parts, laid out by fastkd/native/logit.py: where the logits are, which may differ from forward to
// backward (hooks may move what a graph saves), and the numbers, which stay.
LogitProblem logit_problem(const py::tuple& where, const py::tuple& what) {
    Numbers logits(where), numbers(what);
    const auto matrix = [&] {
        const void* data = logits.address<void>();
        const int64_t stride = logits.integer();
        return Matrix{data, stride, static_cast<Dtype>(numbers.integer())};
    };
    LogitProblem p;
    p.student = matrix();
    p.rows = logits.integer(), p.vocabulary = logits.integer(), p.shared = numbers.integer();
    p.target = numbers.address<int64_t>(), p.ignore_index = numbers.integer();
    p.row_weight = numbers.by_row(), p.alpha = numbers.by_row(), p.temperature = numbers.by_row();
    p.divergence = static_cast<Divergence>(numbers.integer()), p.beta = numbers.real();
    p.scale_by_t2 = numbers.integer(), p.label_smoothing = numbers.real(), p.z_loss = numbers.real();
    p.agreement = numbers.integer(), p.threads = static_cast<int>(numbers.integer());
    p.without_target = numbers.integer(), p.label_slope = numbers.by_row(), p.standardize = numbers.integer();
    while (logits.more()) {
        p.teachers.push_back(matrix());
        p.teacher_temperature.push_back(numbers.by_row());
        p.teacher_weight.push_back(numbers.by_row());
    }
    Numbers::check();
    return p;
}

// (0, scale), or (what is wrong in the data, the offending value): then nothing was computed.
py::tuple forward(const py::tuple& logits, const py::tuple& numbers, int reduction, double divisor, Address loss,
                  Address state) {
    const LogitProblem p = logit_problem(logits, numbers);
    Fault fault;
    double scale = 0;
    {
        const py::gil_scoped_release release;
        fault = find_fault(p);
        if (fault.kind == Fault::none) {
            scale = logit_forward(p, static_cast<Reduction>(reduction), divisor, reinterpret_cast<float*>(loss),
                                  reinterpret_cast<double*>(state));
        }
    }
    return py::make_tuple(static_cast<int>(fault.kind), fault.kind == Fault::none ? scale : fault.got);
}

void backward(const py::tuple& logits, const py::tuple& numbers, Address state, Address grad_loss, int64_t grad_loss_stride,
              double scale, Address grad, int64_t stride, bool fresh) {
    const LogitProblem p = logit_problem(logits, numbers);
    const py::gil_scoped_release release;
    logit_backward(p, reinterpret_cast<const double*>(state), reinterpret_cast<const float*>(grad_loss), grad_loss_stride,
                   scale, reinterpret_cast<void*>(grad), stride, fresh);
}

// `ids`: where they are, and how many a row.
TopKProblem topk_problem(const py::tuple& where, const py::tuple& what, Address ids, int64_t count) {
    LogitProblem logits = logit_problem(where, what);
    logits.divergence = Divergence::forward_kl;  // somebody else's, over the events; mse would do without a softmax
    return {std::move(logits), reinterpret_cast<const int64_t*>(ids), count};
}

// (0, 0, 0), or (what is wrong in the data, what is wrong in the ids, the offending value): then nothing was computed.
py::tuple gather(const py::tuple& logits, const py::tuple& numbers, Address ids, int64_t count, Address best, Address state,
                 Address events) {
    const TopKProblem p = topk_problem(logits, numbers, ids, count);
    Fault fault;
    IdFault wrong;
    {
        const py::gil_scoped_release release;
        fault = find_fault(p.logits);
        if (fault.kind == Fault::none) wrong = find_id_fault(p);
        if (fault.kind == Fault::none && wrong.kind == IdFault::none) {
            topk_gather(p, reinterpret_cast<const int64_t*>(best), reinterpret_cast<double*>(state),
                        reinterpret_cast<float*>(events));
        }
    }
    const bool ids_are_wrong = wrong.kind != IdFault::none;
    return py::make_tuple(static_cast<int>(fault.kind), static_cast<int>(wrong.kind),
                          ids_are_wrong ? static_cast<double>(wrong.got) : fault.got);
}

void scatter(const py::tuple& logits, const py::tuple& numbers, Address ids, int64_t count, Address state, Address events,
             Address slopes, Address grad_loss, int64_t grad_loss_stride, double scale, Address grad, int64_t stride,
             bool fresh) {
    const TopKProblem p = topk_problem(logits, numbers, ids, count);
    const py::gil_scoped_release release;
    topk_scatter(p, reinterpret_cast<const double*>(state), reinterpret_cast<const float*>(events),
                 reinterpret_cast<const float*>(slopes), reinterpret_cast<const float*>(grad_loss), grad_loss_stride, scale,
                 reinterpret_cast<void*>(grad), stride, fresh);
}

// Four tensors and all the rest, laid out by fastkd/native/attention.py.
AttentionProblem attention_problem(const py::tuple& tuple) {
    Numbers numbers(tuple);
    AttentionProblem p;
    for (Heads* heads : {&p.student_queries, &p.student_keys, &p.teacher_queries, &p.teacher_keys}) *heads = numbers.heads();
    p.batch = numbers.integer(), p.queries = numbers.integer(), p.keys = numbers.integer();
    p.key_mask = numbers.address<bool>(), p.query_mask = numbers.address<bool>(), p.causal = numbers.integer();
    p.scale = numbers.real(), p.teacher_scale = numbers.real(), p.threads = static_cast<int>(numbers.integer());
    Numbers::check();
    return p;
}

double forward_attention(const py::tuple& numbers, int reduction, double divisor, Address loss, Address state) {
    const AttentionProblem p = attention_problem(numbers);
    const py::gil_scoped_release release;
    return attention_forward(p, static_cast<AttentionReduction>(reduction), divisor, reinterpret_cast<float*>(loss),
                             reinterpret_cast<double*>(state));
}

void backward_attention(const py::tuple& numbers, Address state, Address grad_loss, bool by_row, double scale,
                        const py::tuple& of_queries, const py::tuple& of_keys, bool same) {
    const AttentionProblem p = attention_problem(numbers);
    const Heads queries = Numbers(of_queries).heads(), keys = Numbers(of_keys).heads();
    Numbers::check();
    const py::gil_scoped_release release;
    attention_backward(p, reinterpret_cast<const double*>(state), reinterpret_cast<const float*>(grad_loss), by_row, scale,
                       queries, keys, same);
}

// `y` is 0 for the rows of x themselves.
template <class T>
void squares(Address x, int64_t n, Address y, int64_t m, int64_t width, int threads, Address out) {
    const py::gil_scoped_release release;
    pair_squares(reinterpret_cast<const T*>(x), n, reinterpret_cast<const T*>(y), m, width, threads,
                 reinterpret_cast<double*>(out));
}

template <class T>
void pull(Address w, Address x, int64_t n, Address y, int64_t m, int64_t width, int threads, Address out) {
    const py::gil_scoped_release release;
    pair_pull(reinterpret_cast<const T*>(w), reinterpret_cast<const T*>(x), n, reinterpret_cast<const T*>(y), m, width, threads,
              reinterpret_cast<T*>(out));
}

template <double (*loss)(const double*, const double*, int64_t, double, int, double*)>
double pair_loss(Address student, Address teacher, int64_t n, double delta, int threads, Address slopes) {
    const py::gil_scoped_release release;
    return loss(reinterpret_cast<const double*>(student), reinterpret_cast<const double*>(teacher), n, delta, threads,
                reinterpret_cast<double*>(slopes));
}

template <class T>
void product(Address left, bool left_doubles, int64_t left_across, int64_t left_along, Address right, bool right_doubles,
             int64_t right_across, int64_t right_along, int64_t rows, int64_t depth, int64_t columns, bool adds, int threads,
             Address out) {
    const Factor a = {reinterpret_cast<const void*>(left), left_doubles, left_across, left_along};
    const Factor b = {reinterpret_cast<const void*>(right), right_doubles, right_across, right_along};
    const py::gil_scoped_release release;
    matmul(a, b, rows, depth, columns, adds, threads, reinterpret_cast<T*>(out));
}

double similarities(Address student, Address teacher, int64_t rows, int64_t columns, double eps, int threads, Address slopes) {
    const py::gil_scoped_release release;
    return compare_similarities(reinterpret_cast<const double*>(student), reinterpret_cast<const double*>(teacher), rows, columns,
                                eps, threads, reinterpret_cast<double*>(slopes));
}

double hint(Address student, int student_dtype, Address teacher, int teacher_dtype, int64_t rows, int64_t width, Address mask,
            int distance, double delta, double scale, int threads, Address gradient) {
    const Hint problem{{reinterpret_cast<const void*>(student), static_cast<Dtype>(student_dtype)},
                       {reinterpret_cast<const void*>(teacher), static_cast<Dtype>(teacher_dtype)},
                       rows, width, reinterpret_cast<const uint8_t*>(mask), static_cast<Distance>(distance),
                       static_cast<float>(delta), scale, threads};
    const py::gil_scoped_release release;
    return hint_loss(problem, reinterpret_cast<float*>(gradient));
}

Maps maps_at(Address features, int dtype, int64_t samples, int64_t channels, int64_t positions, bool channels_last) {
    return {{reinterpret_cast<const void*>(features), static_cast<Dtype>(dtype)}, samples, channels, positions, channels_last};
}

void attention(Address features, int dtype, int64_t samples, int64_t channels, int64_t positions, bool channels_last, double p,
               int threads, Address out) {
    const Maps maps = maps_at(features, dtype, samples, channels, positions, channels_last);
    const py::gil_scoped_release release;
    attention_maps(maps, static_cast<float>(p), threads, reinterpret_cast<float*>(out));
}

double attention_transfer(Address features, int dtype, int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                          double p, int threads, Address teacher, bool paper, double scale, Address gradient) {
    const Maps maps = maps_at(features, dtype, samples, channels, positions, channels_last);
    const py::gil_scoped_release release;
    return attention_map_loss(maps, reinterpret_cast<const float*>(teacher), static_cast<float>(p), paper, scale, threads,
                          reinterpret_cast<float*>(gradient));
}

}  // namespace
}  // namespace fastkd

PYBIND11_MODULE(_C, m) {
    using namespace fastkd;
    m.doc() = "CPU and CUDA kernels on addresses; fastkd.native is their caller.";
    m.def("instruction_set", [] { return active_instruction_set().name; });
    m.def("logit_forward", &forward);
    m.def("logit_backward", &backward);
    m.def("topk_gather", &gather);
    m.def("topk_scatter", &scatter);
    m.def("attention_forward", &forward_attention);
    m.def("attention_backward", &backward_attention);
    m.def("pair_squares", &squares<double>);
    m.def("pair_squares_narrow", &squares<float>);
    m.def("pair_pull", &pull<double>);
    m.def("pair_pull_narrow", &pull<float>);
    m.def("pair_distance_loss", &pair_loss<&pair_distance_loss>);
    m.def("pair_angle_loss", &pair_loss<&pair_angle_loss>);
    m.def("matmul", &product<float>);
    m.def("matmul_wide", &product<double>);
    m.def("compare_similarities", &similarities);
    m.def("hint_loss", &hint);
    m.def("attention_maps", &attention);
    m.def("attention_map_loss", &attention_transfer);
    bind_int8(m);
#ifdef FASTKD_WITH_CUDA
    m.attr("cuda_architectures") = FASTKD_WITH_CUDA;
    cuda::bind(m);
#else
    m.attr("cuda_architectures") = "";
#endif
}
