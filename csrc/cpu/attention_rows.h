// All rows of a loss on attention scores: forward and backward, as fastkd/_attention.py describes them.
#pragma once
#include "attention.h"

namespace fastkd {

// (batch, heads, tokens, dim), whose last dimension has stride 1; strides are in elements.
struct Heads {
    const void* data;
    int64_t batch_stride, head_stride, token_stride;
    Dtype dtype;
    int64_t heads, dim;

    // Of one head: where it is written, too.
    int64_t first(int64_t batch, int64_t head) const { return batch * batch_stride + head * head_stride; }
    int64_t bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
    Tokens tokens(int64_t batch, int64_t head, const int32_t* at, int64_t count) const {
        return {static_cast<const char*>(data) + first(batch, head) * bytes(), token_stride, dtype, at, count, dim};
    }
    void* token(int64_t batch, int64_t head, int64_t i) const {
        return const_cast<char*>(static_cast<const char*>(data)) + (first(batch, head) + i * token_stride) * bytes();
    }
};

struct AttentionProblem {
    Heads student_queries, student_keys, teacher_queries, teacher_keys;
    int64_t batch, queries, keys;
    const bool* key_mask;    // (batch, keys), or nullptr
    const bool* query_mask;  // (batch, queries), or nullptr
    bool causal;
    double scale, teacher_scale;
    int threads;
};

// What becomes of the rows: nothing, their sum over a number, or over the count of those that count.
enum class AttentionReduction : int32_t { none, sum, mean };

// `loss` has one element, or one a row. Returns 1 / divisor, or 0 for a divisor of 0.
double attention_forward(const AttentionProblem&, AttentionReduction, double divisor, float* loss, double* state);

// Gradients of what their data is not nullptr; a token that counts in no row is not written. `grad_loss` has one element,
// or, if `by_row`, one a row. `same`: queries and keys are one tensor, and its gradient is in `of_keys`; `of_queries` is
// float32 then, and what it is given is added.
void attention_backward(const AttentionProblem&, const double* state, const float* grad_loss, bool by_row, double scale,
                        const Heads& of_queries, const Heads& of_keys, bool same);

}  // namespace fastkd
