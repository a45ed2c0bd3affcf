#include "topk_rows.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr double kLowest = -3.402823466e38;
constexpr float kFarthest = -4e6f;  // as the logarithm of a probability: below, a float says nothing of the shares in it

// Memory of a thread, kept from row to row.
struct Named {
    std::vector<int32_t> first, order;
    std::vector<float> values;
    const NamedIds nobody;

    explicit Named(const TopKProblem& p)
        : first((p.logits.shared + kBlock - 1) / kBlock + 1), order(p.count), values(p.count + 16), nobody() {}

    NamedIds of(const int64_t* ids) { return {ids, static_cast<int64_t>(order.size()), nullptr, nullptr, values.data()}; }

    // A counting sort by block.
    NamedIds sorted(const int64_t* ids) {
        std::fill(first.begin(), first.end(), 0);
        const auto count = static_cast<int32_t>(order.size());
        for (int32_t e = 0; e < count; ++e) {
            if (ids[e] >= 0) ++first[ids[e] / kBlock];
        }
        int32_t end = 0;
        for (int32_t& place : first) end += place, place = end;
        for (int32_t e = count - 1; e >= 0; --e) {
            if (ids[e] >= 0) order[--first[ids[e] / kBlock]] = e;
        }
        return {ids, count, first.data(), order.data(), values.data()};
    }
};

// log q of each named id, and of the tail.
void row_events(const RowTask& task, const NamedIds& named, const StudentSums& tail, const StudentSums& student, float* events) {
    const double max = student.max, log_sum = logsum(student.sum);
    if (std::isnan(log_sum)) {
        std::fill_n(events, named.count + 1, static_cast<float>(kNan));
        return;
    }
    // What is finite stays finite: -inf says that there is nothing.
    const auto event = [&](double logit, double more) {
        return static_cast<float>(std::max((logit - max) / task.temperature + more - log_sum, kLowest));
    };
    constexpr auto nothing = static_cast<float>(-kInfinity);
    for (int64_t e = 0; e < named.count; ++e) events[e] = named.values[e] == nothing ? nothing : event(named.values[e], 0);
    events[named.count] = tail.sum > 0 ? event(tail.max, std::log(tail.sum)) : nothing;
}

void gather_row(const TopKProblem& p, int64_t i, RowTask& task, Named& scratch, const int64_t* best, double* state, float* events) {
    const InstructionSet& set = active_instruction_set();
    const LogitProblem& logits = p.logits;
    task.set(logits, i);
    std::fill_n(state, kFirstTeacher, 0.0);
    std::fill_n(events, p.count + 1, 0.0f);
    state[kWeight] = task.weight;
    if (task.weight == 0) return;
    StudentSums student;
    if (task.soft) {
        const NamedIds named = scratch.sorted(p.ids + i * p.count);
        StudentSums tail;
        set.topk.statistics(task.row, named, tail, student);
        row_events(task, named, tail, student, events);
        state[kStudentMax] = student.max;
        state[kStudentLogsum] = logsum(student.sum);
    } else if (task.hard) {
        set.logit.statistics(task.row, student, nullptr);
    }
    if (task.hard) hard_term(logits, task, student, state);
    if (!logits.agreement) return;
    const int64_t favourite = set.logit.best(task.row.student, logits.vocabulary);
    if (logits.target) state[kTargetAgrees] = favourite == task.label;
    if (best) state[kTeacherAgrees] = favourite == best[i];
}

void fill_nan(void* grad, Dtype dtype, int64_t n) {
    if (dtype == Dtype::float32) {
        std::fill_n(static_cast<float*>(grad), n, static_cast<float>(kNan));
    } else {
        std::fill_n(static_cast<uint16_t*>(grad), n, static_cast<uint16_t>(dtype == Dtype::bfloat16 ? 0x7fc0 : 0x7e00));
    }
}

void scatter_row(const TopKProblem& p, int64_t i, RowTask& task, Named& scratch, const double* state, const float* events,
                 const float* slopes, double upstream, void* grad) {
    const int64_t k = p.count;
    task.set(p.logits, i);
    if (task.soft && std::any_of(slopes, slopes + k + 1, [](float x) { return std::isnan(x); })) {
        fill_nan(grad, task.row.student.dtype, p.logits.vocabulary);
        return;
    }
    LogitGradient g = {};
    g.label = -1;
    const double weight = task.weight == 0 ? 0 : upstream * task.weight;
    float spread = 0, pivot = 0;
    NamedIds named = scratch.nobody;
    if (task.soft) {
        named = scratch.of(p.ids + i * k);
        std::copy_n(slopes, k, named.values);
        // A softmax about the tail's own log-sum-exp: by the row's, a tail far below would be 0, and its share 0 / 0.
        const double max = state[kStudentMax], log_q = state[kStudentLogsum] + events[k], lowest = kLowest;
        if (!(events[k] < kFarthest) && slopes[k] != 0) {
            pivot = static_cast<float>(std::clamp(max + task.temperature * log_q, lowest, -lowest));
            spread = static_cast<float>(slopes[k] * std::exp((pivot - max) / task.temperature - log_q));
        }
        g.student = {pivot, task.row.scale, 1, 0};
    }
    if (!task.hard || weight == 0) task.row.hard = Hard::none;
    if (task.row.hard != Hard::none) hard_terms(p.logits, task, state, weight * task.alpha, pivot, 0, g);
    active_instruction_set().topk.gradient(task.row, named, spread, g, grad);
}

// Of one row; `seen` has a bit for every shared id, and gives them back as it got them, all 0.
IdFault row_fault(const int64_t* ids, int64_t count, int64_t shared, std::vector<uint64_t>& seen) {
    for (int64_t e = 0; e < count; ++e) {
        if (ids[e] < -1 || ids[e] >= shared) return {IdFault::outside, ids[e]};
    }
    IdFault fault;
    int64_t e = 0;
    for (; e < count && fault.kind == IdFault::none; ++e) {
        if (ids[e] < 0) continue;
        uint64_t& word = seen[ids[e] / 64];
        const uint64_t bit = uint64_t{1} << (ids[e] % 64);
        if (word & bit) fault = {IdFault::twice, ids[e]};
        word |= bit;
    }
    while (e-- > 0) {
        if (ids[e] >= 0) seen[ids[e] / 64] = 0;
    }
    return fault;
}

}  // namespace

IdFault find_id_fault(const TopKProblem& p) {
    const LogitProblem& logits = p.logits;
    std::atomic<int64_t> first{logits.rows};
    const size_t words = (logits.shared + 63) / 64;
    for_each_chunk(logits.rows, p.count, logits.threads, [&](int64_t begin, int64_t end) {
        RowTask task(logits, true);
        std::vector<uint64_t> seen(words);
        for (int64_t i = begin; i < end; ++i) {
            task.set(logits, i);
            if (task.weight == 0 || row_fault(p.ids + i * p.count, p.count, logits.shared, seen).kind == IdFault::none) continue;
            int64_t before = first;
            while (i < before && !first.compare_exchange_weak(before, i)) {}
            return;
        }
    });
    if (first == logits.rows) return {};
    std::vector<uint64_t> seen(words);
    return row_fault(p.ids + first * p.count, p.count, logits.shared, seen);
}

void topk_gather(const TopKProblem& p, const int64_t* best, double* state, float* events) {
    for_each_chunk(p.logits.rows, p.logits.vocabulary, p.logits.threads, [&](int64_t begin, int64_t end) {
        RowTask task(p.logits, true);
        Named scratch(p);
        for (int64_t i = begin; i < end; ++i) {
            gather_row(p, i, task, scratch, best, state + i * kFirstTeacher, events + i * (p.count + 1));
        }
    });
}

void topk_scatter(const TopKProblem& p, const double* state, const float* events, const float* slopes, const float* grad_loss,
                  int64_t grad_loss_stride, double scale, void* grad, int64_t grad_stride, bool fresh) {
    const int64_t rows = p.logits.rows, bytes = grad_stride * (p.logits.student.dtype == Dtype::float32 ? 4 : 2);
    if (fresh) prefer_huge_pages(grad, rows * bytes);
    for_each_chunk(rows, p.logits.vocabulary, p.logits.threads, [&](int64_t begin, int64_t end) {
        RowTask task(p.logits, true);
        Named scratch(p);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i * (p.count + 1);
            const double upstream = grad_loss[i * grad_loss_stride] * scale;
            scatter_row(p, i, task, scratch, state + i * kFirstTeacher, events + first, slopes + first, upstream,
                        static_cast<char*>(grad) + i * bytes);
        }
    });
}

}  // namespace fastkd
