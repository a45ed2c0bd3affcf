// Winograd's transforms of int8 convolutions, and the products between them: int8_winograd.h. Included by one unit for each
// instruction set.
//
// A line of m outputs is made of products at m + 2 points: infinity and as many of 0, 1, -1, 2, -2. The transform of numbers is
// whole (none exceeds 144 times 128), and that of weights, which is the same for every m, is made whole row by row: 6, -4, -4,
// 1, 1 and 6 times the value at the point. The factors that are still missing are in the transforms of numbers and of sums,
// so that what comes out is 24 times an output: twice, 576 times. Everything is exact modulo 2^32, and 576 = 9 * 2^6 leaves the
// output modulo 2^26.
#pragma once
#include "int8_products-inl.h"

namespace fastkd {
namespace {

// Numbers of 16 bits, two to a lane. Without a sign, for what follows the channels may overflow.
constexpr int kChannels = 2 * W;
constexpr uint16_t kMinus3 = 65536 - 3, kMinus6 = 65536 - 6;
typedef uint16_t vp __attribute__((vector_size(4 * W)));

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

template <int outputs>
FASTKD_INLINE void transform_numbers(const vp (&d)[kWinogradPoints], vp (&v)[kWinogradPoints]) {
    if constexpr (outputs == 4) {
        const vp a = d[4] - (d[2] << 2), b = d[3] - (d[1] << 2), c = d[4] - d[2], e = (d[3] - d[1]) << 1;
        v[0] = ((d[0] - d[2]) << 2) + c;
        v[1] = a + b;
        v[2] = a - b;
        v[3] = c + e;
        v[4] = c - e;
        v[5] = d[5] - d[3] - (e << 1);
    } else if constexpr (outputs == 3) {
        const vp a = d[3] - d[1], b = d[3] - d[2];
        v[0] = (((d[0] - d[2]) << 1) + a) << 1;
        v[1] = (b - (d[1] << 1)) * 3;
        v[2] = b - ((d[2] - d[1]) << 1);
        v[3] = a << 2;
        v[5] = d[4] - d[2] - (a << 1);
    } else if constexpr (outputs == 2) {
        v[0] = (d[0] - d[2]) << 2;
        v[1] = (d[1] + d[2]) * kMinus3;
        v[2] = (d[1] - d[2]) * 3;
        v[5] = d[3] - d[1];
    } else {
        v[0] = (d[0] - d[1]) << 2;
        v[1] = d[1] * kMinus6;
        v[5] = d[2] - d[1];
    }
}

template <int down, int across>
static void winograd_numbers(const WinogradNumbers& n) {
    constexpr int64_t kBytes = kChannels * sizeof(Number);
    const char* numbers = n.numbers;
    char* out = n.out;
    for (int64_t c = 0; c < n.channels; c += kChannels, numbers += kBytes, out += sizeof(vp)) {
        vp columns[kWinogradPoints][kWinogradPoints];
#pragma GCC unroll 6
        for (int x = 0; x < across + 2; ++x) {
            vp d[kWinogradPoints], v[kWinogradPoints];
#pragma GCC unroll 6
            for (int y = 0; y < down + 2; ++y) d[y] = take_numbers(numbers + y * n.line + x * n.pixel);
            transform_numbers<down>(d, v);
#pragma GCC unroll 6
            for (int y = 0; y < kWinogradPoints; ++y) {
                if (has_winograd_point(down, y)) columns[y][x] = v[y];
            }
        }
        for (int y = 0; y < kWinogradPoints; ++y) {
            if (!has_winograd_point(down, y)) continue;
            vp v[kWinogradPoints];
            transform_numbers<across>(columns[y], v);
            // What stands for 0 is in all numbers, and of all points only this one is not left without it.
            if (y == 1) v[1] -= (uint16_t)(36 * kZero);
#pragma GCC unroll 6
            for (int x = 0; x < kWinogradPoints; ++x) {
                if (has_winograd_point(across, x)) __builtin_memcpy(out + (y * kWinogradPoints + x) * n.position, &v[x], sizeof(vp));
            }
        }
    }
}

// A function of how many outputs there are each way, from 1 to 4.
#define FASTKD_OF_TILE(function)                                                                  \
    {                                                                                             \
        {function<1, 1>, function<1, 2>, function<1, 3>, function<1, 4>},                         \
            {function<2, 1>, function<2, 2>, function<2, 3>, function<2, 4>},                     \
            {function<3, 1>, function<3, 2>, function<3, 3>, function<3, 4>},                     \
            {function<4, 1>, function<4, 2>, function<4, 3>, function<4, 4>},                     \
    }

void int8_winograd_numbers(const WinogradNumbers& n) {
    static constexpr void (*kOfTile[kWinogradTile][kWinogradTile])(const WinogradNumbers&) = FASTKD_OF_TILE(winograd_numbers);
    kOfTile[n.down - 1][n.across - 1](n);
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
    products_by<ProductTile<PairWords, false>>(a, rows, panels, block, sums);
}

template <int outputs>
FASTKD_INLINE void transform_sums(const vu (&m)[kWinogradPoints], vu (&y)[kWinogradTile]) {
    if constexpr (outputs == 1) {
        y[0] = m[0] + m[1] + (m[5] << 2);
        return;
    }
    const vu s = m[1] + m[2], d = m[1] - m[2];
    if constexpr (outputs == 2) {
        y[0] = m[0] + s;
        y[1] = d + (m[5] << 2);
    } else if constexpr (outputs == 3) {
        y[0] = m[0] + s + m[3];
        y[1] = d + (m[3] << 1);
        y[2] = s + ((m[3] + m[5]) << 2);
    } else {
        const vu t = m[3] + m[4], e = (m[3] - m[4]) << 1;
        y[0] = m[0] + s + t;
        y[1] = d + e;
        y[2] = s + (t << 2);
        y[3] = d + ((e + m[5]) << 2);
    }
}

template <int down, int across, bool at_once>
static void winograd_sums(const WinogradSums& s) {
    for (int64_t c = 0; c < s.columns; c += W) {
        vu lines[kWinogradTile][kWinogradPoints];
#pragma GCC unroll 6
        for (int x = 0; x < kWinogradPoints; ++x) {
            if (!has_winograd_point(across, x)) continue;
            vu m[kWinogradPoints], y[kWinogradTile];
#pragma GCC unroll 6
            for (int i = 0; i < kWinogradPoints; ++i) {
                if (!has_winograd_point(down, i)) continue;
                __builtin_memcpy(&m[i], s.sums + (i * kWinogradPoints + x) * s.position + c, sizeof(vu));
            }
            transform_sums<down>(m, y);
#pragma GCC unroll 4
            for (int i = 0; i < down; ++i) lines[i][x] = y[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < down; ++i) {
            vu y[kWinogradTile];
            vi sums[across];
            transform_sums<across>(lines[i], y);
#pragma GCC unroll 4
            for (int x = 0; x < across; ++x) sums[x] = (vi)(y[x] * 0x38e38e39u) >> 6;  // the inverse of 9 modulo 2^32
            if (at_once) {
                Int8Lines l = *s.lines;
                l.output = static_cast<float*>(l.output) + i * s.line;
                finish_tile<across, 1>(l, c, sums);
                continue;
            }
#pragma GCC unroll 4
            for (int x = 0; x < across; ++x) __builtin_memcpy(s.out + i * s.line + x * s.pixel + c, &sums[x], sizeof(vi));
        }
    }
}

template <int down, int across>
static void winograd_sums(const WinogradSums& s) {
    s.lines ? winograd_sums<down, across, true>(s) : winograd_sums<down, across, false>(s);
}

void int8_winograd_sums(const WinogradSums& s) {
    static constexpr void (*kOfTile[kWinogradTile][kWinogradTile])(const WinogradSums&) = FASTKD_OF_TILE(winograd_sums);
    kOfTile[s.down - 1][s.across - 1](s);
}

#undef FASTKD_OF_TILE

}  // namespace
}  // namespace fastkd
