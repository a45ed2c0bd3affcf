// Winograd's transforms of int8 convolutions, and the products between them: int8_winograd.h. Included by one unit for each
// instruction set.
//
// With points 0, 1, -1, 2, -2 and infinity the transform of numbers is whole by itself (no number exceeds 100 times 128),
// and that of weights is made whole row by row, so that 24 times an output is what the last transform gives: twice, 576
// times. Everything is exact modulo 2^32, and 576 = 9 * 2^6 leaves the output modulo 2^26.
#pragma once
#include "int8_products-inl.h"

namespace fastkd {
namespace {

// Numbers of 16 bits, two to a lane.
constexpr int kChannels = 2 * W;
typedef int16_t vp __attribute__((vector_size(4 * W)));

// Of the numbers of kChannels.
FASTKD_INLINE vp take_numbers(const char* p) {
#if defined(__AVX512VNNI__)
    return (vp)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    vp x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
#endif
}

FASTKD_INLINE void transform_numbers(const vp (&d)[kWinogradSide], vp (&v)[kWinogradSide]) {
    const vp a = d[4] - (d[2] << 2), b = d[3] - (d[1] << 2), c = d[4] - d[2], e = (d[3] - d[1]) << 1;
    v[0] = ((d[0] - d[2]) << 2) + c;
    v[1] = a + b;
    v[2] = a - b;
    v[3] = c + e;
    v[4] = c - e;
    v[5] = d[5] - d[3] - (e << 1);
}

// 6 x 6 pixels, as many numbers of each position side by side as there are channels, rounded up to whole vectors.
void int8_winograd_numbers(const char* numbers, int64_t line, int64_t pixel, int64_t channels, char* out, int64_t position) {
    constexpr int64_t kBytes = kChannels * sizeof(Number);
    for (int64_t c = 0; c < channels; c += kChannels, numbers += kBytes, out += sizeof(vp)) {
        vp columns[kWinogradSide][kWinogradSide];
#pragma GCC unroll 6
        for (int x = 0; x < kWinogradSide; ++x) {
            vp d[kWinogradSide], v[kWinogradSide];
#pragma GCC unroll 6
            for (int y = 0; y < kWinogradSide; ++y) d[y] = take_numbers(numbers + y * line + x * pixel);
            transform_numbers(d, v);
#pragma GCC unroll 6
            for (int y = 0; y < kWinogradSide; ++y) columns[y][x] = v[y];
        }
        char* to = out;
        for (int y = 0; y < kWinogradSide; ++y) {
            vp v[kWinogradSide];
            transform_numbers(columns[y], v);
            // What stands for 0 is in all numbers, and of all positions only this one is not left without it.
            if (y == 1) v[1] -= (int16_t)(36 * kZero);
#pragma GCC unroll 6
            for (int x = 0; x < kWinogradSide; ++x, to += position) __builtin_memcpy(to, &v[x], sizeof(vp));
        }
    }
}

// Two numbers of 16 bits to a word, numbers and weights.
struct PairWords {
    static constexpr int64_t kBytes = W * 4;
    static constexpr bool kFinished = false;
    static vi load(const char* p) {
        vi w;
        __builtin_memcpy(&w, p, sizeof w);
        return w;
    }
    static vi add(vi sums, vi numbers, vi w) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)numbers, (__m512i)w);
#else
        return add_products(sums, numbers, w);
#endif
    }
};

void int8_winograd_products(const Int8Rows& a, int rows, int panels, const char* block, int32_t* sums) {
    products_by<ProductTile<PairWords>>(a, rows, panels, block, sums);
}

FASTKD_INLINE void transform_sums(const vu (&m)[kWinogradSide], vu (&y)[kWinogradTile]) {
    const vu s = m[1] + m[2], d = m[1] - m[2], t = m[3] + m[4], e = (m[3] - m[4]) << 1;
    y[0] = m[0] + s + t;
    y[1] = d + e;
    y[2] = s + (t << 2);
    y[3] = d + ((e + m[5]) << 2);
}

// From the sums of the 36 positions to those of 4 x 4 outputs, of whole panels.
void int8_winograd_sums(const int32_t* sums, int64_t position, int64_t columns, int32_t* out, int64_t line, int64_t pixel) {
    for (int64_t c = 0; c < columns; c += W) {
        vu lines[kWinogradTile][kWinogradSide];
#pragma GCC unroll 6
        for (int x = 0; x < kWinogradSide; ++x) {
            vu m[kWinogradSide], y[kWinogradTile];
#pragma GCC unroll 6
            for (int i = 0; i < kWinogradSide; ++i) {
                __builtin_memcpy(&m[i], sums + (i * kWinogradSide + x) * position + c, sizeof(vu));
            }
            transform_sums(m, y);
#pragma GCC unroll 4
            for (int i = 0; i < kWinogradTile; ++i) lines[i][x] = y[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < kWinogradTile; ++i) {
            vu y[kWinogradTile];
            transform_sums(lines[i], y);
#pragma GCC unroll 4
            for (int x = 0; x < kWinogradTile; ++x) {
                const vi sum = (vi)(y[x] * 0x38e38e39u) >> 6;  // the inverse of 9 modulo 2^32
                __builtin_memcpy(out + i * line + x * pixel + c, &sum, sizeof sum);
            }
        }
    }
}

}  // namespace
}  // namespace fastkd
