#include "logit_rows.h"

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

// Where a state has them.
template <class Number>
Number* moments_of(const LogitProblem& p, Number* state) {
    return state + kFirstTeacher + kTeacherColumns * p.teachers.size();
}

struct Divided {
    double value, omega;
};

// The value and omega of one teacher, finished from its sums.
Divided finish(const RowTask& task, int32_t k, const LogitKernels& kernels, const StudentSums& student,
               const TeacherSums& teacher, const double* state) {
    const LogitRow& row = task.row;
    const Row& taught = row.teachers[k];
    const double zs = student.sum, zt = teacher.sum;
    // A side with a NaN or a +inf has the sum NaN, one without a finite logit 0.
    const bool valid = zs > 0 && zt > 0;
    switch (row.divergence) {
        case Divergence::forward_kl:
        case Divergence::cross_entropy: {
            const bool kl = row.divergence == Divergence::forward_kl;
            const double value = kLn2 * (teacher.cross / zt + std::log2(kl ? zs / zt : zs));
            const bool infinite = valid && student.masked && kernels.unmatched(row.student, taught, row.shared, row.absent);
            return {infinite ? kInfinity : valid ? value : kNan, -1};
        }
        case Divergence::mse: {
            const double value = valid ? teacher.cross / teacher.count : kNan;
            return {value, std::isfinite(value) ? teacher.count : value};
        }
        default: {
            const double* columns = state + kFirstTeacher + kTeacherColumns * k;
            Divided result;
            kernels.divergence(row, k, normaliser(state + kStudentMax, row.scale),
                               normaliser(columns, row.teacher_scale[k]), &result.value, &result.omega);
            const bool infinite = row.divergence == Divergence::reverse_kl && valid && teacher.masked &&
                                  kernels.unmatched(taught, row.student, row.shared, row.absent);
            return infinite ? Divided{kInfinity, kInfinity} : result;
        }
    }
}

void soft_term(const LogitProblem& p, int64_t i, RowTask& task, const LogitKernels& kernels, const StudentSums& student,
               const std::vector<TeacherSums>& teachers, double* state) {
    // Where only the target has a finite logit, the others are no distribution: they have the log-sum -inf, and no NaN.
    const auto log_sum = [&](double sum) { return p.without_target && sum == 0 ? -kInfinity : logsum(sum); };
    state[kStudentMax] = student.max;
    state[kStudentLogsum] = log_sum(student.sum);
    const double t = task.temperature, squared = p.scale_by_t2 ? t * t : 1;
    double soft = 0;
    for (int32_t k = 0; k < task.row.teacher_count; ++k) {
        if (task.teacher_scale[k] == kSkipped) continue;
        double* columns = state + kFirstTeacher + kTeacherColumns * k;
        columns[kTeacherMax] = teachers[k].max;
        columns[kTeacherLogsum] = log_sum(teachers[k].sum);
        const Divided divided = finish(task, k, kernels, student, teachers[k], state);
        columns[kOmega] = divided.omega;
        const double share = p.teacher_weight[k][i];
        if (share != 0) soft += share * squared * divided.value;
    }
    state[kSoft] = soft;
}

void agreement(const LogitProblem& p, int64_t i, const RowTask& task, const LogitKernels& kernels, double* state) {
    const int64_t student = kernels.best(task.row.student, p.vocabulary);
    if (p.target) state[kTargetAgrees] = student == task.label;
    double share = 0;
    for (size_t k = 0; k < task.teachers.size(); ++k) {
        if (student == kernels.best(task.teachers[k], p.shared)) share += p.teacher_weight[k][i];
    }
    state[kTeacherAgrees] = share;
}

// The moments of student and teachers, while the row is on its way into the cache for what follows.
void measure(const LogitProblem& p, int64_t i, RowTask& task, const LogitKernels& kernels, double* columns) {
    for (size_t side = 0; side <= task.teachers.size(); ++side) {
        if (side > 0 && task.teacher_scale[side - 1] == kSkipped) continue;
        const Moments m = kernels.moments(side == 0 ? task.row.student : task.teachers[side - 1], p.shared);
        double* own = columns + kMoments * side;
        own[kLift] = m.count > 0 ? m.highest - m.mean : 0;
        own[kStd] = m.count > 1 ? std::sqrt(m.squares / (m.count - 1)) : 0;
        own[kCount] = m.count;
    }
    task.standardize(p, i, columns);
}

// A row of the state, and weight * (alpha H + (1 - alpha) S). A term of weight 0 was left at 0, whatever it multiplies.
double forward_row(const LogitProblem& p, int64_t i, RowTask& task, const LogitKernels& kernels,
                   std::vector<TeacherSums>& teachers, double* state) {
    task.set(p, i);
    std::fill(state, state + state_width(p), 0.0);
    state[kWeight] = task.weight;
    if (task.weight == 0) return 0;
    if (p.standardize && task.soft) measure(p, i, task, kernels, moments_of(p, state));
    if (task.hard || task.soft) {
        StudentSums student;
        std::fill(teachers.begin(), teachers.end(), TeacherSums());
        kernels.statistics(task.row, student, teachers.data());
        if (task.soft) soft_term(p, i, task, kernels, student, teachers, state);
        if (task.hard && task.row.absent >= 0) add_absent(task, student);
        if (task.hard) hard_term(p, task, student, state);
    }
    if (p.agreement) agreement(p, i, task, kernels, state);
    const double alpha = task.alpha;
    return task.weight * (alpha * state[kHard] + (1 - alpha) * state[kSoft]);
}

// Memory for the gradient of a row, kept by a thread from row to row.
struct GradientScratch {
    std::vector<Normaliser> teachers;
    std::vector<float> coefficients;
    std::vector<double> omega;

    explicit GradientScratch(size_t n) : teachers(n), coefficients(n), omega(n) {}
};

void teacher_terms(const LogitProblem& p, int64_t i, RowTask& task, const double* state, double weight,
                   GradientScratch& scratch) {
    const double t = task.temperature;
    // The slope of a standardised row that is constant would be without bound.
    const bool constant = p.standardize && moments_of(p, state)[kStd] == 0;
    for (size_t k = 0; k < task.teachers.size(); ++k) {
        const double* columns = state + kFirstTeacher + kTeacherColumns * k;
        const double omega = columns[kOmega];
        const double slope = p.divergence == Divergence::mse ? 2 / omega : (p.scale_by_t2 ? t : 1 / t) / task.spread;
        double coefficient = weight * p.teacher_weight[k][i] * slope;
        if (weight == 0 || omega == kInfinity || constant) coefficient = 0;
        if (coefficient == 0 && p.label_slope[i] == 0) task.teacher_scale[k] = kSkipped;
        scratch.teachers[k] = normaliser(columns, task.teacher_scale[k]);
        scratch.coefficients[k] = static_cast<float>(coefficient);
        scratch.omega[k] = omega;
    }
}

void backward_row(const LogitProblem& p, int64_t i, RowTask& task, const LogitKernels& kernels, GradientScratch& scratch,
                  const double* state, double upstream, void* grad) {
    task.set(p, i);
    const double weight = task.weight == 0 ? 0 : upstream * task.weight;
    if (p.standardize && task.soft) task.standardize(p, i, moments_of(p, state));
    LogitGradient g = {};
    g.student = normaliser(state + kStudentMax, task.row.scale);
    g.teachers = scratch.teachers.data();
    g.teacher_coefficient = scratch.coefficients.data();
    g.omega = scratch.omega.data();
    g.label = -1;
    teacher_terms(p, i, task, state, weight * (1 - task.alpha), scratch);
    if (!task.hard || weight == 0) task.row.hard = Hard::none;
    if (task.row.hard != Hard::none) {
        hard_terms(p, task, state, weight * task.alpha, state[kStudentMax], state[kStudentLogsum], g);
    }
    if (const auto slope = static_cast<float>(p.label_slope[i]); slope != 0) {
        g.student_coefficient -= slope;
        g.label_coefficient += slope;
        g.label = task.label;
    }
    if (p.standardize && task.soft && weight != 0) {
        // dz/ds: what is along s - mean changes the spread of the logits, not z.
        const double* m = moments_of(p, state);
        g.lift = static_cast<float>(m[kLift]);
        if (m[kStd] != 0) g.along = static_cast<float>(-kernels.along(task.row, g) / ((m[kCount] - 1) * m[kStd] * task.spread));
    }
    kernels.gradient(task.row, g, grad);
}

}  // namespace

Fault find_fault(const LogitProblem& p) {
    const auto positive = [](double t) { return t > 0 && t < kInfinity; };
    for (int64_t i = 0; i < p.rows; ++i) {
        if (p.target) {
            const int64_t label = p.target[i];
            if (label != p.ignore_index && (label < 0 || label >= p.vocabulary)) {
                return {Fault::target, static_cast<double>(label)};
            }
        }
        if (!positive(p.temperature[i])) return {Fault::temperature, p.temperature[i]};
        for (const ByRow& temperature : p.teacher_temperature) {
            if (!positive(temperature[i])) return {Fault::teacher_temperature, temperature[i]};
        }
    }
    return {};
}

double logit_forward(const LogitProblem& p, Reduction reduction, double divisor, float* loss, double* state) {
    const LogitKernels& kernels = active_instruction_set().logit;
    const int64_t width = state_width(p);
    std::vector<double> losses(p.rows);
    for_each_chunk(p.rows, p.vocabulary, p.threads, [&](int64_t begin, int64_t end) {
        RowTask task(p, !p.teachers.empty());
        std::vector<TeacherSums> teachers(p.teachers.size());
        for (int64_t i = begin; i < end; ++i) losses[i] = forward_row(p, i, task, kernels, teachers, state + i * width);
    });
    double sum = 0, weights = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
        sum += losses[i];
        weights += state[i * width + kWeight];
        if (reduction == Reduction::none) loss[i] = static_cast<float>(losses[i]);
    }
    if (reduction == Reduction::mean) divisor = weights;
    if (reduction != Reduction::none) *loss = divisor == 0 ? 0 : static_cast<float>(sum / divisor);
    return divisor == 0 ? 0 : 1 / divisor;
}

void logit_backward(const LogitProblem& p, const double* state, const float* grad_loss, int64_t grad_loss_stride, double scale,
                    void* grad, int64_t grad_stride, bool fresh) {
    const LogitKernels& kernels = active_instruction_set().logit;
    const int64_t width = state_width(p);
    const int64_t bytes = grad_stride * (p.student.dtype == Dtype::float32 ? 4 : 2);
    if (fresh) prefer_huge_pages(grad, p.rows * bytes);
    for_each_chunk(p.rows, p.vocabulary, p.threads, [&](int64_t begin, int64_t end) {
        RowTask task(p, !p.teachers.empty());
        GradientScratch scratch(p.teachers.size());
        for (int64_t i = begin; i < end; ++i) {
            const double upstream = grad_loss[i * grad_loss_stride] * scale;
            backward_row(p, i, task, kernels, scratch, state + i * width, upstream, static_cast<char*>(grad) + i * bytes);
        }
    });
}

}  // namespace fastkd
