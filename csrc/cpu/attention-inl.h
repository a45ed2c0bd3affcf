// Attention scores of a block of queries, a tile of keys at a time. Included by one unit for each instruction set.
//
// A tile holds a row for each key and a lane for each query, so that all numbers of a row of the loss are vertical: no
// sum and no maximum crosses lanes.
#pragma once
#include "attention.h"
#include "product-inl.h"

namespace fastkd {
namespace {

constexpr int64_t kPiece = 256;  // of a token, that is widened at a time

FASTKD_INLINE int64_t whole(int64_t n, int64_t width) { return (n + width - 1) / width * width; }

FASTKD_INLINE const float* widened(const Tokens& tokens, int64_t i, int64_t begin, int64_t n, float* scratch) {
    const int64_t first = tokens.at[i] * tokens.stride + begin;
    if (tokens.dtype == Dtype::float32) return static_cast<const float*>(tokens.data) + first;
    const uint16_t* source = static_cast<const uint16_t*>(tokens.data) + first;
    if (tokens.dtype == Dtype::bfloat16) {
        widen_into<widen_bfloat16>(source, n, scratch);
    } else {
        widen_into<widen_float16>(source, n, scratch);
    }
    return scratch;
}

// 0, or NaN where the token holds a NaN or an infinity.
FASTKD_INLINE float fault_of(const Tokens& tokens, int64_t i, float* scratch) {
    vf found = splat(0.0f);
    for (int64_t begin = 0; begin < tokens.dim; begin += kPiece) {
        const int64_t n = tokens.dim - begin < kPiece ? tokens.dim - begin : kPiece;
        const float* x = widened(tokens, i, begin, n, scratch);
        int64_t d = 0;
        for (; d + W <= n; d += W) found += load(x + d) - load(x + d);
        for (; d < n; ++d) found[0] += x[d] - x[d];
    }
    return (float)sum(found);
}

// Four tokens' numbers side by side: one store for four, where a compiler would scatter.
FASTKD_INLINE void interleave(const float* const* tokens, int64_t n, int64_t width, float* out) {
    typedef float Four __attribute__((vector_size(16)));
    for (int64_t d = 0; d < n; ++d) {
        const Four four = {tokens[0][d], tokens[1][d], tokens[2][d], tokens[3][d]};
        __builtin_memcpy(out + d * width, &four, sizeof four);
    }
}

void pack(const Tokens& tokens, int64_t width, float* panels, float* rows, int64_t padded, float* fault) {
    alignas(64) float scratch[4][kPiece], zeros[kPiece] = {};
    for (int64_t first = 0; first < whole(tokens.count, width); first += 4) {
        bool usable[4];
        for (int l = 0; l < 4; ++l) {
            usable[l] = first + l < tokens.count;
            if (!usable[l]) continue;
            const float found = fault_of(tokens, first + l, scratch[0]);
            fault[first + l] += found;
            usable[l] = found == 0;  // a faulty token is packed as zeros
        }
        float* column = panels + first / width * width * tokens.dim + first % width;
        for (int64_t begin = 0; begin < tokens.dim; begin += kPiece) {
            const int64_t n = tokens.dim - begin < kPiece ? tokens.dim - begin : kPiece;
            const float* x[4];
            for (int l = 0; l < 4; ++l) {
                x[l] = usable[l] ? widened(tokens, first + l, begin, n, scratch[l]) : zeros;
                if (rows != nullptr) __builtin_memcpy(rows + (first + l) * padded + begin, x[l], n * sizeof(float));
            }
            interleave(x, n, width, column + begin * width);
        }
        for (int l = 0; rows != nullptr && l < 4; ++l) {
            for (int64_t d = tokens.dim; d < padded; ++d) rows[(first + l) * padded + d] = 0;
        }
    }
}

void write_row(const float* x, int64_t n, void* out, Dtype dtype) { write(out, dtype, 0, x, n); }

// The keys [begin, begin + n) and all lanes; up to a whole panel of keys is written.
FASTKD_INLINE void score(const AttentionSide& side, int64_t begin, int64_t n, int64_t lanes, float* scores) {
    for (int64_t j = 0; j < n; j += kRows) {
        const float* keys = side.keys + (begin + j) * side.dim;
        for (int64_t i = 0; i < lanes; i += kLanes) {
            multiply<kRows, 1, kVectors>(keys, side.queries + i * side.dim, kLanes, side.dim, scores + j * kQueries + i,
                                         kQueries, false);
        }
    }
}

// What a faulty token, of either model, does to the scores.
static void spoil(const AttentionBlock& block, int64_t begin, int64_t n, float* scores) {
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < block.queries; ++i) {
            scores[j * kQueries + i] += block.key_fault[begin + j] + block.query_fault[i];
        }
    }
}

// Where a query does not see a key.
FASTKD_INLINE void hide(const AttentionBlock& block, int64_t begin, int64_t n, float value, float* scores) {
    for (int64_t j = 0; j < n; ++j) {
        const int32_t at = block.key_at[begin + j];
        for (int64_t i = 0; i < block.queries && block.query_at[i] < at; ++i) scores[j * kQueries + i] = value;
    }
}

FASTKD_INLINE bool hidden(const AttentionBlock& block, int64_t begin, int64_t n) {
    return block.causal && block.key_at[begin + n - 1] > block.query_at[0];
}

// Both models' scores of a tile, -inf where they are hidden.
FASTKD_INLINE void score_tile(const AttentionBlock& block, int64_t begin, int64_t n, int64_t lanes, float* s, float* t) {
    score(block.student, begin, n, lanes, s);
    score(block.teacher, begin, n, lanes, t);
    if (block.faulty) {
        spoil(block, begin, n, s);
        spoil(block, begin, n, t);
    }
    if (hidden(block, begin, n)) {
        hide(block, begin, n, -kInfinity, s);
        hide(block, begin, n, -kInfinity, t);
    }
}

FASTKD_INLINE vf below(vf score, vf max, float scale) { return at_least((score - max) * scale, splat(kFloor)); }

// When the maxima rise, sums shrink by 2^d, and in `cross` a difference of exponents moves by d_t - d_s.
FASTKD_INLINE void move(AttentionSums& sums, int64_t i, vf student_by, vf teacher_by) {
    const vf student = exp2(student_by), teacher = exp2(teacher_by);
    for (int l = 0; l < W; ++l) {
        const double by = (double)teacher_by[l] - (double)student_by[l];
        sums.cross[i + l] = (sums.cross[i + l] + by * sums.teacher_sum[i + l]) * (double)teacher[l];
        sums.teacher_sum[i + l] *= (double)teacher[l];
        sums.student_sum[i + l] *= (double)student[l];
    }
}

// One tile more, for W queries.
FASTKD_INLINE void see(const AttentionBlock& block, const float* s, const float* t, int64_t n, int64_t i, AttentionSums& sums) {
    const vf student_old = load(sums.student_max + i), teacher_old = load(sums.teacher_max + i);
    vf student_max = student_old, teacher_max = teacher_old;
    for (int64_t j = 0; j < n; ++j) {
        student_max = at_least(load(s + j * kQueries + i), student_max);
        teacher_max = at_least(load(t + j * kQueries + i), teacher_max);
    }
    const float student_scale = block.student.scale, teacher_scale = block.teacher.scale;
    move(sums, i, below(student_old, student_max, student_scale), below(teacher_old, teacher_max, teacher_scale));
    vf student = splat(0.0f), teacher = splat(0.0f), cross = splat(0.0f);
    for (int64_t j = 0; j < n; ++j) {
        const vf xs = below(load(s + j * kQueries + i), student_max, student_scale);
        const vf xt = below(load(t + j * kQueries + i), teacher_max, teacher_scale);
        const vf et = exp2(xt);
        student += exp2(xs);
        teacher += et;
        cross += et * (xt - xs);
    }
    for (int l = 0; l < W; ++l) {
        sums.student_sum[i + l] += (double)student[l];
        sums.teacher_sum[i + l] += (double)teacher[l];
        sums.cross[i + l] += (double)cross[l];
    }
    store(sums.student_max + i, student_max);
    store(sums.teacher_max + i, teacher_max);
}

void attention_statistics(const AttentionBlock& block, AttentionSums& sums) {
    float *s = block.scores, *t = s + kKeys * kQueries;
    const int64_t lanes = whole(block.queries, kLanes);
    for (int64_t i = 0; i < kQueries; ++i) {
        sums.student_max[i] = sums.teacher_max[i] = -3.402823466e38f;
        sums.student_sum[i] = sums.teacher_sum[i] = sums.cross[i] = 0;
    }
    for (int64_t begin = 0; begin < block.keys; begin += kKeys) {
        const int64_t n = block.keys - begin < kKeys ? block.keys - begin : kKeys;
        score_tile(block, begin, n, lanes, s, t);
        for (int64_t i = 0; i < lanes; i += W) see(block, s, t, n, i, sums);
    }
}

// weight * (q - p) in place of the student's scores.
FASTKD_INLINE void differ(const AttentionBlock& block, const AttentionGradient& g, int64_t n, int64_t i, float* s, const float* t) {
    const vf student_max = load(g.student_max + i), teacher_max = load(g.teacher_max + i);
    const vf student = load(g.student_inverse + i), teacher = load(g.teacher_inverse + i), weight = load(g.weight + i);
    for (int64_t j = 0; j < n; ++j) {
        const vf q = exp2(below(load(s + j * kQueries + i), student_max, block.student.scale)) * student;
        const vf p = exp2(below(load(t + j * kQueries + i), teacher_max, block.teacher.scale)) * teacher;
        store(s + j * kQueries + i, (rounded(q) - rounded(p)) * weight);
    }
}

void attention_gradient(const AttentionBlock& block, const AttentionGradient& g) {
    float *s = block.scores, *t = s + kKeys * kQueries;
    const int64_t lanes = whole(block.queries, kLanes);
    for (int64_t begin = 0; begin < block.keys; begin += kKeys) {
        const int64_t n = block.keys - begin < kKeys ? block.keys - begin : kKeys, keys = whole(n, kRows);
        score_tile(block, begin, n, lanes, s, t);
        for (int64_t i = 0; i < lanes; i += W) differ(block, g, n, i, s, t);
        if (hidden(block, begin, n)) hide(block, begin, n, 0, s);  // where a row is NaN, 0 times its sum is
        for (int64_t j = n; j < keys; ++j) {
            for (int64_t i = 0; i < lanes; ++i) s[j * kQueries + i] = 0;
        }
        if (g.key_rows != nullptr) {
            add_product<kQueries, 1>(s, g.key_rows + begin * g.padded, lanes, g.padded, n, g.of_queries);
        }
        if (g.query_rows != nullptr) {
            add_product<1, kQueries>(s, g.query_rows, keys, g.padded, lanes, g.of_keys + begin * g.padded);
        }
    }
}

}  // namespace
}  // namespace fastkd
