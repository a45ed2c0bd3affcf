#include "logit_task.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

namespace fastkd {
namespace {

float value_at(const Row& row, int64_t i) {
    if (row.dtype == Dtype::float32) return static_cast<const float*>(row.data)[i];
    const uint32_t h = static_cast<const uint16_t*>(row.data)[i];
    if (row.dtype == Dtype::bfloat16) {
        const uint32_t bits = h << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
    const int exponent = (h >> 10) & 31, mantissa = h & 1023;
    const double magnitude = exponent == 31 ? (mantissa ? kNan : kInfinity)
                             : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                            : std::ldexp(mantissa, -24);
    return static_cast<float>(h & 0x8000 ? -magnitude : magnitude);
}

// Of a logit, so that 2^(scale x) is exp(x / T); finite, since it multiplies zeros.
float scale(double temperature) {
    return static_cast<float>(std::min<double>(kLog2e / temperature, std::numeric_limits<float>::max()));
}

Hard power(double temperature) {
    if (temperature == 1) return Hard::same;
    if (temperature == 2) return Hard::square;
    return temperature == 4 ? Hard::fourth : Hard::separate;
}

}  // namespace

double logsum(double sum) { return sum > 0 ? std::log(sum) : kNan; }

Normaliser normaliser(const double* state, float scale) {
    return {static_cast<float>(state[0]), scale, static_cast<float>(std::exp(-state[1])), state[1] * kLog2e};
}

RowTask::RowTask(const LogitProblem& p, bool taught)
    : teachers(p.teachers.size()), teacher_scale(p.teachers.size()), taught(taught) {}

void RowTask::set(const LogitProblem& p, int64_t i) {
    label = p.target ? p.target[i] : -1;
    const bool ignored = p.target && label == p.ignore_index;
    weight = ignored ? 0 : static_cast<float>(p.row_weight[i]);
    alpha = p.alpha[i];
    temperature = p.temperature[i];
    spread = 1;
    hard = p.target && weight != 0 && alpha != 0;
    soft = taught && weight != 0 && alpha != 1;
    for (size_t k = 0; k < teachers.size(); ++k) {
        teachers[k] = p.teachers[k].row(i);
        const bool counts = soft && (p.without_target || p.teacher_weight[k][i] != 0);
        teacher_scale[k] = counts ? scale(p.teacher_temperature[k][i]) : kSkipped;
    }
    row = {p.student.row(i), teachers.data(), static_cast<int32_t>(teachers.size()), p.vocabulary, p.shared,
           p.divergence,     p.beta,          soft, Hard::none, p.label_smoothing > 0,
           scale(temperature), teacher_scale.data(), soft && p.without_target ? label : -1};
    if (hard) row.hard = !soft ? Hard::same : p.without_target || p.standardize ? Hard::separate : power(temperature);
}

void RowTask::standardize(const LogitProblem& p, int64_t i, const double* moments) {
    // A NaN makes its row NaN by itself; as a temperature it would be an error.
    const auto of = [](double std) { return 1e-7 + (std::isnan(std) ? 1 : std::min(std, 1e30)); };
    spread = of(moments[kStd]);
    row.scale = scale(temperature * spread);
    for (size_t k = 0; k < teachers.size(); ++k) {
        if (teacher_scale[k] == kSkipped) continue;
        teacher_scale[k] = scale(p.teacher_temperature[k][i] * of(moments[kMoments * (1 + k) + kStd]));
    }
}

void add_absent(const RowTask& task, StudentSums& student) {
    const float logit = value_at(task.row.student, task.row.absent);
    const double before = student.hard_max;
    if (logit > student.hard_max) student.hard_max = logit;
    student.hard_sum = student.hard_sum * std::exp(before - student.hard_max) + std::exp((double)logit - student.hard_max);
}

void hard_term(const LogitProblem& p, const RowTask& task, const StudentSums& student, double* state) {
    const double highest = student.hard_max, log_sum = logsum(student.hard_sum), eps = p.label_smoothing;
    double hard = p.z_loss * (highest + log_sum) * (highest + log_sum);
    if (eps < 1) hard += (1 - eps) * (log_sum - (value_at(task.row.student, task.label) - highest));
    if (eps > 0) hard += eps * (log_sum - (student.total / p.vocabulary - highest));
    state[kHard] = std::isnan(log_sum) ? kNan : hard;
    state[kHardMax] = student.hard_max;
    state[kHardLogsum] = log_sum;
}

void hard_terms(const LogitProblem& p, const RowTask& task, const double* state, double weight, double max, double log_sum,
                LogitGradient& g) {
    const double highest = state[kHardMax], hard_log_sum = state[kHardLogsum];
    const double coefficient = weight * (1 + 2 * p.z_loss * (highest + hard_log_sum));
    g.hard = normaliser(state + kHardMax, static_cast<float>(kLog2e));
    g.hard_coefficient = static_cast<float>(coefficient * std::exp(-hard_log_sum));
    g.constant = static_cast<float>(-weight * p.label_smoothing / p.vocabulary);
    g.label_coefficient = static_cast<float>(-weight * (1 - p.label_smoothing));
    g.label = task.label;
    if (task.row.absent >= 0) {  // no pass sees it: its own probability, here
        const double log_q = value_at(task.row.student, task.label) - highest - hard_log_sum;
        g.label_coefficient += static_cast<float>(coefficient * std::exp(log_q));
    }
    if (!task.soft || p.divergence == Divergence::mse) return;
    // exp(s) = exp(s / T)^T: with q = exp((s - m) / T - z) the hard probability is q^T exp(T z + m - m_1 - z_1).
    const double ratio = std::exp(task.temperature * log_sum + max - highest - hard_log_sum);
    g.power_coefficient = static_cast<float>(coefficient * ratio);
    if (task.row.hard == Hard::same) g.student_coefficient = g.power_coefficient;
}

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr int64_t kHugePage = 2 << 20;
    const auto address = reinterpret_cast<uintptr_t>(data), page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (bytes >= 4 * kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace fastkd
