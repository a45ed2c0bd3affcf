// Small products of matrices, of floats or of doubles, that stay in the first caches. Included by one unit for each
// instruction set.
//
// A register tile is kRows x NV vectors. Its left operand is read one number at a time and its right one a vector at a
// time; 16 accumulators (8 where there are 16 registers) are enough to hide the latency of two multiply-adds a cycle.
#pragma once
#include "doubles-inl.h"
#include "tiles-inl.h"

namespace fastkd {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kLanes = kVectors * W;

// c[m][n] (+)= sum_k a[k * STEP_K + m * STEP_M] b[k * b_stride + n]. Not inlined: in a large function gcc spills.
template <int STEP_K, int STEP_M, int NV, class T>
static __attribute__((noinline)) void multiply(const T* a, const T* b, int64_t b_stride, int64_t depth, T* c, int64_t c_stride,
                                               bool adds) {
    constexpr int64_t width = kWidth<T>;
    Vector<T> total[kRows][NV];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * NV; ++i) {
        total[i / NV][i % NV] = Vector<T>{};
    }
    for (int64_t k = 0; k < depth; ++k, a += STEP_K, b += b_stride) {
        Vector<T> right[NV];
        for (int v = 0; v < NV; ++v) right[v] = load(b + v * width);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const Vector<T> left = a[m * STEP_M] - Vector<T>{};
            for (int v = 0; v < NV; ++v) total[m][v] += left * right[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows * NV; ++i) {
        T* at = c + i / NV * c_stride + i % NV * width;
        store(at, adds ? load(at) + total[i / NV][i % NV] : total[i / NV][i % NV]);
    }
}

// c += a b for `rows` rows of c, a multiple of kRows, and `columns` columns, a multiple of W.
template <int STEP_K, int STEP_M>
FASTKD_INLINE void add_product(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth, float* c) {
    for (int64_t n = 0; n < columns; n += kLanes) {
        for (int64_t m = 0; m < rows; m += kRows) {
            if (columns - n >= kLanes) {
                multiply<STEP_K, STEP_M, kVectors>(a + m * STEP_M, b + n, columns, depth, c + m * columns + n, columns, true);
            } else {
                multiply<STEP_K, STEP_M, 1>(a + m * STEP_M, b + n, columns, depth, c + m * columns + n, columns, true);
            }
        }
    }
}

}  // namespace
}  // namespace fastkd
