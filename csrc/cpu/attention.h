// The pieces of the losses on attention scores, on packed tokens: what every instruction set implements.
// The mathematics is in fastkd/reference/attention.py. A score is a product q k here; `scale` holds log2(e) too.
#pragma once
#include "logit.h"

namespace fastkd {

constexpr int64_t kQueries = 64;  // of a block, which is one lane of a vector each
constexpr int64_t kKeys = 96;     // of a tile

// Some tokens of one head; the stride is in elements.
struct Tokens {
    const void* data;
    int64_t stride;
    Dtype dtype;
    const int32_t* at;  // their positions, ascending
    int64_t count, dim;
};

// What one model's scores of a block come from.
struct AttentionSide {
    const float* queries;  // [panel][dim][lane]
    const float* keys;     // [panel][dim][key]
    int64_t dim;
    float scale;
};

// A block of queries and all keys that any of them sees.
struct AttentionBlock {
    AttentionSide student, teacher;
    int64_t queries, keys;
    const int32_t* query_at;  // positions, of which a query sees its own and those before, if `causal`
    const int32_t* key_at;
    const float* query_fault;  // NaN for a token that holds a NaN or an infinity, else 0
    const float* key_fault;
    bool causal, faulty;  // faulty: some of them are NaN
    float* scores;        // room for 2 * kKeys * kQueries
};

struct AttentionSums {
    float student_max[kQueries], teacher_max[kQueries];
    double student_sum[kQueries], teacher_sum[kQueries];  // sum 2^((s - max) scale)
    double cross[kQueries];                               // sum 2^x_t (x_t - x_s)
};

struct AttentionGradient {
    float student_max[kQueries], teacher_max[kQueries];
    float student_inverse[kQueries], teacher_inverse[kQueries];  // 1 / sum
    float weight[kQueries];                                      // of a query's row, its scale included
    const float* query_rows;                                     // [query][padded], or nullptr: of keys no gradient
    const float* key_rows;                                       // [key][padded], or nullptr: of queries no gradient
    int64_t padded;                                              // the student's dim, in whole vectors
    float* of_queries;                                           // [query][padded], is added to
    float* of_keys;                                              // [key][padded], is added to
};

struct AttentionKernels {
    int64_t lanes, rows, vector;  // queries of a panel, keys of a panel, and what `padded` is a multiple of
    // Panels of `width` tokens, and rows unless nullptr. A faulty token is packed as zeros; `fault` adds up its NaN.
    void (*pack)(const Tokens&, int64_t width, float* panels, float* rows, int64_t padded, float* fault);
    void (*statistics)(const AttentionBlock&, AttentionSums&);
    void (*gradient)(const AttentionBlock&, const AttentionGradient&);
    void (*write)(const float* x, int64_t n, void* out, Dtype);
};

}  // namespace fastkd
