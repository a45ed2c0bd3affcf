#include "attention_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

// The columns of the state: fastkd/_attention.py.
enum { kCounts, kStudentMax, kStudentLogsum, kTeacherMax, kTeacherLogsum, kColumns };

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Floats that begin with a cache line, and are not set.
class Floats {
  public:
    explicit Floats(int64_t n = 0) { resize(n); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    ~Floats() { release(); }

    void resize(int64_t n) {
        if (n <= size_) return;
        release();
        data_ = static_cast<float*>(::operator new(n * sizeof(float), kLine));
        size_ = n;
    }
    float* data() { return data_; }

  private:
    static constexpr std::align_val_t kLine{64};
    void release() {
        if (data_ != nullptr) ::operator delete(data_, kLine);
        data_ = nullptr, size_ = 0;
    }
    float* data_ = nullptr;
    int64_t size_ = 0;
};

int64_t whole(int64_t n, int64_t width) { return (n + width - 1) / width * width; }

// Positions of the tokens that take part in one sequence. Only they are packed, so that padding costs nothing.
struct Present {
    std::vector<int32_t> keys, queries;

    Present(const AttentionProblem& p, int64_t batch) {
        fill(keys, p.key_mask, batch, p.keys);
        fill(queries, p.query_mask, batch, p.queries);
        // A row that sees no key counts in nothing.
        const int32_t first = keys.empty() ? std::numeric_limits<int32_t>::max() : p.causal ? keys[0] : 0;
        queries.erase(queries.begin(), std::lower_bound(queries.begin(), queries.end(), first));
    }

  private:
    static void fill(std::vector<int32_t>& at, const bool* mask, int64_t batch, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            if (mask == nullptr || mask[batch * n + i]) at.push_back(static_cast<int32_t>(i));
        }
    }
};

// A student's head of keys is a unit of work, and so is each of several parts of the rows that read it, where there are
// fewer heads than threads would like: every part has keys' gradients of its own, which are added up in their order.
struct Plan {
    int64_t parts, units;

    explicit Plan(const AttentionProblem& p) : units(p.batch * p.student_keys.heads) {
        const int64_t sharing = p.student_queries.heads / std::max<int64_t>(1, p.student_keys.heads);
        const int64_t blocks = sharing * ((p.queries + kQueries - 1) / kQueries);
        constexpr int64_t kPerThread = 4, kLeastBlocks = 4;
        const int64_t wanted = p.threads < 2 ? 1 : (kPerThread * p.threads + units - 1) / std::max<int64_t>(1, units);
        parts = std::max<int64_t>(1, std::min(wanted, blocks / kLeastBlocks));
    }
};

// The memory of one task, and the packed keys of the heads that it is at.
class Task {
  public:
    Task(const AttentionProblem& p, const Plan& plan, const AttentionKernels& kernels, int64_t index)
        : p_(p),
          kernels_(kernels),
          batch_(index / plan.parts / p.student_keys.heads),
          head_of_keys_(index / plan.parts % p.student_keys.heads),
          present_(p, batch_),
          padded_(whole(p.student_keys.dim, kernels.vector)),
          rounded_(whole(keys(), kernels.rows)),
          scores_(2 * kKeys * kQueries),
          faults_(2 * (keys() + kQueries)) {
        const int64_t sharing = p.student_queries.heads / p.student_keys.heads;
        const int64_t part = index % plan.parts, blocks = (queries() + kQueries - 1) / kQueries;
        first_head_ = head_of_keys_ * sharing, blocks_ = blocks;
        begin_ = sharing * blocks * part / plan.parts, end_ = sharing * blocks * (part + 1) / plan.parts;
        block_.student.scale = static_cast<float>(p.scale * kLog2e);
        block_.teacher.scale = static_cast<float>(p.teacher_scale * kLog2e);
        block_.student.dim = p.student_keys.dim, block_.teacher.dim = p.teacher_keys.dim;
        block_.key_at = present_.keys.data(), block_.causal = p.causal, block_.scores = scores_.data();
    }

    // Calls visit(head, positions, count) with the block filled in, for all blocks of queries of this task.
    template <class Visit>
    void for_each_block(bool query_rows, bool key_rows, const Visit& visit) {
        if (begin_ == end_) return;
        pack_student(key_rows);
        int64_t packed = -1;
        for (int64_t i = begin_; i < end_; ++i) {
            const int64_t head = first_head_ + i / blocks_, begin = i % blocks_ * kQueries;
            const int64_t teacher = head / (p_.teacher_queries.heads / p_.teacher_keys.heads);
            if (teacher != packed) pack_teacher(teacher);
            packed = teacher;
            const int64_t count = std::min<int64_t>(kQueries, queries() - begin);
            pack_queries(head, present_.queries.data() + begin, count, query_rows);
            visit(head, block_.query_at, count);
        }
    }

    const AttentionBlock& block() const { return block_; }
    float* query_rows() { return query_rows_.data(); }
    float* key_rows() { return key_rows_.data(); }
    int64_t padded() const { return padded_; }
    int64_t rounded() const { return rounded_; }
    int64_t batch() const { return batch_; }
    int64_t head_of_keys() const { return head_of_keys_; }
    const std::vector<int32_t>& keys_at() const { return present_.keys; }

  private:
    int64_t keys() const { return static_cast<int64_t>(present_.keys.size()); }
    int64_t queries() const { return static_cast<int64_t>(present_.queries.size()); }
    // NaN or 0 for each key of the student's, of the teacher's or its own, and for each query.
    float* student_faults() { return faults_.data(); }
    float* key_faults() { return faults_.data() + keys(); }
    float* query_faults() { return faults_.data() + 2 * keys(); }

    void pack_student(bool key_rows) {
        student_panels_.resize(rounded_ * p_.student_keys.dim);
        if (key_rows) key_rows_.resize(rounded_ * padded_);
        std::fill_n(student_faults(), keys(), 0.0f);
        kernels_.pack(p_.student_keys.tokens(batch_, head_of_keys_, present_.keys.data(), keys()), kernels_.rows,
                      student_panels_.data(), key_rows ? key_rows_.data() : nullptr, padded_, student_faults());
        block_.student.keys = student_panels_.data();
    }

    void pack_teacher(int64_t head) {
        teacher_panels_.resize(rounded_ * p_.teacher_keys.dim);
        std::copy_n(student_faults(), keys(), key_faults());
        kernels_.pack(p_.teacher_keys.tokens(batch_, head, present_.keys.data(), keys()), kernels_.rows,
                      teacher_panels_.data(), nullptr, 0, key_faults());
        block_.teacher.keys = teacher_panels_.data(), block_.key_fault = key_faults();
        keys_faulty_ = std::any_of(key_faults(), key_faults() + keys(), [](float x) { return x != x; });
    }

    void pack_queries(int64_t head, const int32_t* at, int64_t count, bool query_rows) {
        student_queries_.resize(kQueries * p_.student_queries.dim);
        teacher_queries_.resize(kQueries * p_.teacher_queries.dim);
        if (query_rows) query_rows_.resize(kQueries * padded_);
        std::fill_n(query_faults(), kQueries, 0.0f);
        kernels_.pack(p_.student_queries.tokens(batch_, head, at, count), kernels_.lanes, student_queries_.data(),
                      query_rows ? query_rows_.data() : nullptr, padded_, query_faults());
        kernels_.pack(p_.teacher_queries.tokens(batch_, head, at, count), kernels_.lanes, teacher_queries_.data(), nullptr, 0,
                      query_faults());
        block_.student.queries = student_queries_.data(), block_.teacher.queries = teacher_queries_.data();
        block_.queries = count, block_.query_at = at, block_.query_fault = query_faults();
        block_.faulty = keys_faulty_ || std::any_of(query_faults(), query_faults() + count, [](float x) { return x != x; });
        block_.keys = keys();
        if (p_.causal) {
            block_.keys = std::upper_bound(present_.keys.begin(), present_.keys.end(), at[count - 1]) - present_.keys.begin();
        }
    }

    const AttentionProblem& p_;
    const AttentionKernels& kernels_;
    int64_t batch_, head_of_keys_;
    Present present_;
    int64_t padded_, rounded_;  // the student's dim in whole vectors, the number of keys in whole panels
    Floats scores_, faults_, student_panels_, teacher_panels_, key_rows_, student_queries_, teacher_queries_, query_rows_;
    AttentionBlock block_ = {};
    int64_t first_head_, blocks_, begin_, end_;
    bool keys_faulty_ = false;
};

double row_loss(const AttentionSums& sums, int64_t i, double* state) {
    const double student = sums.student_sum[i], teacher = sums.teacher_sum[i];
    state[kCounts] = 1;
    state[kStudentMax] = sums.student_max[i], state[kStudentLogsum] = std::log(student);
    state[kTeacherMax] = sums.teacher_max[i], state[kTeacherLogsum] = std::log(teacher);
    return kLn2 * (sums.cross[i] / teacher + std::log2(student / teacher));
}

// The rows of a block as the gradient needs them; lanes without a row have weight 0.
void set_rows(AttentionGradient& g, const double* state, const float* grad_loss, bool by_row, double scale,
              const int32_t* at, int64_t count) {
    for (int64_t i = 0; i < kQueries; ++i) {
        g.student_max[i] = g.teacher_max[i] = g.student_inverse[i] = g.teacher_inverse[i] = g.weight[i] = 0;
        if (i >= count) continue;
        const double* row = state + at[i] * kColumns;
        g.student_max[i] = static_cast<float>(row[kStudentMax]);
        g.teacher_max[i] = static_cast<float>(row[kTeacherMax]);
        g.student_inverse[i] = static_cast<float>(std::exp(-row[kStudentLogsum]));
        g.teacher_inverse[i] = static_cast<float>(std::exp(-row[kTeacherLogsum]));
        g.weight[i] = static_cast<float>(scale * grad_loss[by_row ? at[i] : 0]);
    }
}

struct Backward {
    const AttentionProblem& p;
    const Plan& plan;
    const AttentionKernels& kernels;
    const double* state;
    const float* grad_loss;
    bool by_row;
    double scale;
    const Heads &of_queries, &of_keys;
    bool same;

    // The gradients of the task's queries; those of its keys are added to `keys`.
    void rows(Task& task, float* keys) const {
        const int64_t padded = task.padded();
        Floats block(kQueries * padded);
        task.for_each_block(of_keys.data != nullptr, of_queries.data != nullptr, [&](int64_t head, const int32_t* at, int64_t n) {
            AttentionGradient g;
            const int64_t row = (task.batch() * p.student_queries.heads + head) * p.queries;
            set_rows(g, state + row * kColumns, grad_loss + (by_row ? row : 0), by_row, scale, at, n);
            std::fill_n(block.data(), kQueries * padded, 0.0f);
            g.query_rows = of_keys.data != nullptr ? task.query_rows() : nullptr;
            g.key_rows = of_queries.data != nullptr ? task.key_rows() : nullptr;
            g.padded = padded, g.of_queries = block.data(), g.of_keys = keys;
            kernels.gradient(task.block(), g);
            if (of_queries.data == nullptr) return;
            for (int64_t i = 0; i < n; ++i) {
                kernels.write(block.data() + i * padded, of_queries.dim, of_queries.token(task.batch(), head, at[i]),
                              of_queries.dtype);
            }
        });
    }

    // The sum of the parts of one head of keys, in their order. Where queries and keys are one tensor, masks may still
    // tell them apart.
    void write_keys(const Task& task, float* sums, int64_t parts) const {
        const int64_t padded = task.padded(), dim = of_keys.dim, size = task.rounded() * padded;
        const std::vector<int32_t>& at = task.keys_at();
        std::vector<float> none(dim);
        size_t next = 0;
        for (int64_t i = 0; i < p.keys; ++i) {
            const bool present = next < at.size() && at[next] == i;
            if (!present && !same) continue;
            float* sum = present ? sums + next++ * padded : none.data();
            if (!present) std::fill(none.begin(), none.end(), 0.0f);
            for (int64_t part = 1; present && part < parts; ++part) add(sum + part * size, sum);
            if (same) add(static_cast<const float*>(of_queries.token(task.batch(), task.head_of_keys(), i)), sum);
            kernels.write(sum, dim, of_keys.token(task.batch(), task.head_of_keys(), i), of_keys.dtype);
        }
    }

    void add(const float* x, float* sum) const {
        for (int64_t d = 0; d < of_keys.dim; ++d) sum[d] += x[d];
    }
};

// Chunks of one task each, unless all of them together are little.
int64_t ids_of(const AttentionProblem& p, const Plan& plan) {
    const int64_t sharing = p.student_queries.heads / std::max<int64_t>(1, p.student_keys.heads);
    return sharing * p.queries * p.keys / plan.parts;
}

}  // namespace

double attention_forward(const AttentionProblem& p, AttentionReduction reduction, double divisor, float* loss, double* state) {
    const AttentionKernels& kernels = active_instruction_set().attention;
    const int64_t rows = p.batch * p.student_queries.heads * p.queries;
    const Plan plan(p);
    std::vector<double> losses(rows);
    std::fill_n(state, rows * kColumns, 0.0);
    for_each_chunk(plan.units * plan.parts, ids_of(p, plan), p.threads, [&](int64_t first, int64_t last) {
        AttentionSums sums;
        for (int64_t index = first; index < last; ++index) {
            Task task(p, plan, kernels, index);
            task.for_each_block(false, false, [&](int64_t head, const int32_t* at, int64_t n) {
                kernels.statistics(task.block(), sums);
                const int64_t row = (task.batch() * p.student_queries.heads + head) * p.queries;
                for (int64_t i = 0; i < n; ++i) losses[row + at[i]] = row_loss(sums, i, state + (row + at[i]) * kColumns);
            });
        }
    });
    double sum = 0, counting = 0;
    for (int64_t i = 0; i < rows; ++i) {
        sum += losses[i];
        counting += state[i * kColumns + kCounts];
        if (reduction == AttentionReduction::none) loss[i] = static_cast<float>(losses[i]);
    }
    if (reduction == AttentionReduction::mean) divisor = counting;
    if (reduction != AttentionReduction::none) *loss = divisor == 0 ? 0 : static_cast<float>(sum / divisor);
    return divisor == 0 ? 0 : 1 / divisor;
}

void attention_backward(const AttentionProblem& p, const double* state, const float* grad_loss, bool by_row, double scale,
                        const Heads& of_queries, const Heads& of_keys, bool same) {
    const AttentionKernels& kernels = active_instruction_set().attention;
    const Plan plan(p);
    const Backward backward{p, plan, kernels, state, grad_loss, by_row, scale * p.scale, of_queries, of_keys, same};
    const int64_t room = whole(p.keys, kernels.rows) * whole(p.student_keys.dim, kernels.vector);
    // With several parts the keys' gradients wait for the last of them; `same` waits for those of all queries.
    const bool kept = plan.parts > 1 && of_keys.data != nullptr;
    Floats sums(kept ? plan.units * plan.parts * room : 0);
    for_each_chunk(plan.units * plan.parts, ids_of(p, plan), p.threads, [&](int64_t first, int64_t last) {
        Floats own(kept || of_keys.data == nullptr ? 0 : room);
        for (int64_t index = first; index < last; ++index) {
            Task task(p, plan, kernels, index);
            const int64_t size = task.rounded() * task.padded();
            float* keys = kept ? sums.data() + index / plan.parts * plan.parts * room + index % plan.parts * size : own.data();
            if (of_keys.data != nullptr) std::fill_n(keys, size, 0.0f);
            backward.rows(task, keys);
            if (of_keys.data != nullptr && !kept) backward.write_keys(task, keys, 1);
        }
    });
    if (!kept) return;
    for_each_chunk(plan.units, p.keys * plan.parts, p.threads, [&](int64_t first, int64_t last) {
        for (int64_t unit = first; unit < last; ++unit) {
            const Task task(p, plan, kernels, unit * plan.parts);
            backward.write_keys(task, sums.data() + unit * plan.parts * room, plan.parts);
        }
    });
}

}  // namespace fastkd
