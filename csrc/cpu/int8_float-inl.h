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

// As product_tile in int8_products-inl.h, of rows of floats.
template <int rows, int panels>
__attribute__((noinline)) void float_tile(const Int8Rows& a, const char* block, float* out) {
    vf sums[rows * panels]{};
    const char* weights = block + panels * sizeof(vi);
    for (const Run* run = a.runs; run < a.runs + a.count; ++run) {
        for (int64_t word = 0; word < run->words; ++word) {
#pragma GCC unroll 4
            for (int j = 0; j < kPerWord; ++j) {
                vf column[panels];  // the words are read again for each number: sums leave no registers for them
#pragma GCC unroll 4
                for (int p = 0; p < panels; ++p) column[p] = weight_of(load_weights(weights + p * kWordBytes), j);
#pragma GCC unroll 24
                for (int i = 0; i < rows * panels; ++i) {
                    float x;
                    __builtin_memcpy(&x, a.at[i / panels] + run->offset + (word * kPerWord + j) * sizeof x, sizeof x);
                    sums[i] += x * column[i % panels];
                }
            }
            weights += panels * kWordBytes;
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < rows * panels; ++i) __builtin_memcpy(out + i * W, &sums[i], sizeof(vf));
}

template <int rows>
FASTKD_INLINE void float_products_of_rows(const Int8Rows& a, int panels, const char* block, float* sums) {
    switch (panels) {
        case 1: return float_tile<rows, 1>(a, block, sums);
        case 2: return float_tile<rows, 2>(a, block, sums);
        case 3:
            if constexpr (kPanels >= 3) return float_tile<rows, 3>(a, block, sums);
            break;
        case 4:
            if constexpr (kPanels >= 4 && rows * 4 <= kSums) return float_tile<rows, 4>(a, block, sums);
    }
}

void int8_float_products(const Int8Rows& a, int rows, int panels, const char* block, float* sums) {
    switch (rows) {
        case 1: return float_products_of_rows<1>(a, panels, block, sums);
        case 2: return float_products_of_rows<2>(a, panels, block, sums);
        case 3: return float_products_of_rows<3>(a, panels, block, sums);
        case 4: return float_products_of_rows<4>(a, panels, block, sums);
#if defined(__AVX512F__)
        case 5: return float_products_of_rows<5>(a, panels, block, sums);
        case 6: return float_products_of_rows<6>(a, panels, block, sums);
        case 7: return float_products_of_rows<7>(a, panels, block, sums);
        case 8: return float_products_of_rows<8>(a, panels, block, sums);
#endif
    }
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
