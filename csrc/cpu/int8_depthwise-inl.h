// Convolutions of each channel by itself, channels innermost, where words have two numbers, and of kernels that are too
// large for one part (int8_pack.h): lanes are channels, and of a word of weights the first byte is one. Included by one unit
// for each instruction set.
#pragma once
#include "int8_products-inl.h"

namespace fastkd {
namespace {

// W numbers, each in 32 bits.
FASTKD_INLINE vi load_numbers(const char* p) {
    vn x;
    __builtin_memcpy(&x, p, sizeof x);
    return widened(x);
}

// Of numbers that 16 bits hold: the other halves are 0, or the sign, times 0.
FASTKD_INLINE vi add_each(vi sums, vi numbers, vi weights) {
#if defined(__x86_64__)
    return add_products(sums, numbers, weights);
#else
    return sums + numbers * (weights << 16 >> 16);
#endif
}

template <int rows>
static void depthwise_panels(const Int8Rows& a, int panels, const char* block, int32_t* out) {
    const int64_t pitch = panels * W;
    for (int64_t panel = 0; panel < panels; ++panel) {
        const char* weights = block + panel * sizeof(vi);
        vi sums[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) __builtin_memcpy(&sums[r], weights, sizeof(vi));
        for (const Run* run = a.runs; run < a.runs + a.count; ++run) {
            int64_t at = panel * W * sizeof(Number) + run->offset;
            for (int64_t word = 0; word < run->words; ++word) {
                weights += pitch * sizeof(int32_t);
                vi w;
                __builtin_memcpy(&w, weights, sizeof w);
                w = (w << 24 >> 24) & 0xffff;
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r) sums[r] = add_each(sums[r], load_numbers(a.at[r] + at), w);
                at += 4;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) __builtin_memcpy(out + r * pitch + panel * W, &sums[r], sizeof(vi));
    }
}

void int8_depthwise_products(const Int8Rows& a, int rows, int panels, const char* block, int32_t* sums) {
    switch (rows) {
        case 1: return depthwise_panels<1>(a, panels, block, sums);
        case 2: return depthwise_panels<2>(a, panels, block, sums);
        case 3: return depthwise_panels<3>(a, panels, block, sums);
        case 4: return depthwise_panels<4>(a, panels, block, sums);
#if defined(__AVX512F__)
        case 5: return depthwise_panels<5>(a, panels, block, sums);
        case 6: return depthwise_panels<6>(a, panels, block, sums);
        case 7: return depthwise_panels<7>(a, panels, block, sums);
        case 8: return depthwise_panels<8>(a, panels, block, sums);
#endif
    }
}

}  // namespace
}  // namespace fastkd
