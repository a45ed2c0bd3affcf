// int8 weights beside floats: products of the two, and numbers made floats. Included by one unit for each instruction set.
#pragma once
#include "int8_finish-inl.h"
#include "int8_products-inl.h"

namespace fastkd {
namespace {

// Number j of each of a panel's words, as floats.
FASTKD_INLINE vf weight_of(vi w, int j) {
    constexpr int kBits = 32 / kPerWord;
    return __builtin_convertvector(w << (32 - kBits * (j + 1)) >> (32 - kBits), vf);
}

// As ProductTile, of rows of floats.
struct FloatTile {
    typedef LayerWords Words;
    template <int rows, int panels>
    static void compute(const Int8Rows& a, const Int8Panels& b);
};

template <int rows, int panels>
__attribute__((noinline)) void FloatTile::compute(const Int8Rows& a, const Int8Panels& b) {
    PanelWords<panels, Words> weights(b);
    vf sums[rows * panels]{};
    for (const Run* run = a.runs; run < a.runs + a.count; ++run) {
        const char* at[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) at[r] = a.at[r] + run->offset;
        for (int64_t word = 0; word < run->words; ++word) {
#pragma GCC unroll 4
            for (int j = 0; j < kPerWord; ++j) {
                vf column[panels];  // the words are read again for each number: sums leave no registers for them
#pragma GCC unroll 4
                for (int p = 0; p < panels; ++p) column[p] = weight_of(weights.load(p), j);
#pragma GCC unroll 24
                for (int i = 0; i < rows * panels; ++i) {
                    float x;
                    __builtin_memcpy(&x, at[i / panels] + (word * kPerWord + j) * sizeof x, sizeof x);
                    sums[i] += x * column[i % panels];
                }
            }
            weights.next();
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < rows * panels; ++i) {
        __builtin_memcpy(b.sums + i / panels * b.pitch + i % panels * sizeof(vf), &sums[i], sizeof(vf));
    }
}

void int8_float_products(const Int8Rows& a, int rows, int panels, const char* block, float* sums) {
    products_by<FloatTile>(a, rows, panels, block, sums);
}

void int8_widen(const void* x, Dtype dtype, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, take<true>(x, dtype, i, W));
    if (i < n) put<false>(out, Dtype::float32, i, n - i, take<false>(x, dtype, i, n - i));
}

template <bool whole>
FASTKD_INLINE void dequantize_vector(const int8_t* numbers, int64_t i, int64_t n, vf scale, void* out, Dtype dtype) {
    typedef int8_t vb __attribute__((vector_size(W)));
    vb x{};
    __builtin_memcpy(&x, numbers + i, whole ? sizeof x : n);
    put<whole>(out, dtype, i, n, __builtin_convertvector(widened(x), vf) * scale);
}

void int8_dequantize(const int8_t* numbers, int64_t n, float scale, void* out, Dtype dtype) {
    const vf by = splat(scale);
    int64_t i = 0;
    for (; i + W <= n; i += W) dequantize_vector<true>(numbers, i, W, by, out, dtype);
    if (i < n) dequantize_vector<false>(numbers, i, n - i, by, out, dtype);
}

}  // namespace
}  // namespace fastkd
