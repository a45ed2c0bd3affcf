// Convolutions of each channel by itself, channels innermost: lanes are channels. Included by one unit for each instruction
// set; only where words have four numbers is there something to gain.
//
// Of 64 channels the numbers of four taps go into words, one tap beside the other. Where the next pixel's taps are one
// further, the same words serve it too, with weights that lie one byte further: so half of them need not be made.
#pragma once
#include "int8_products-inl.h"

namespace fastkd {
namespace {

#if defined(__AVX512VNNI__)
// Words of 64 channels: within each quarter of a vector four channels in a row, and the next four in the next vector.
struct Words64 {
    __m512i of[4];
};

struct Pair64 {
    __m512i low, high;
};

FASTKD_INLINE Pair64 pair_of(const char* a, const char* b) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return {_mm512_unpacklo_epi8(x, y), _mm512_unpackhi_epi8(x, y)};
}

FASTKD_INLINE Words64 words_of(const Pair64& a, const Pair64& b) {
    return {{_mm512_unpacklo_epi16(a.low, b.low), _mm512_unpackhi_epi16(a.low, b.low), _mm512_unpacklo_epi16(a.high, b.high),
             _mm512_unpackhi_epi16(a.high, b.high)}};
}

FASTKD_INLINE void add_words(Words64& sums, const Words64& numbers, const char* weights) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        sums.of[k] = _mm512_dpbusd_epi32(sums.of[k], numbers.of[k], _mm512_loadu_si512(weights + k * sizeof(vi)));
    }
}

FASTKD_INLINE Words64 first_sums(const char* weights) {
    Words64 sums;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums.of[k] = _mm512_loadu_si512(weights + k * sizeof(vi));
    return sums;
}

// To the order of the channels: a square of quarters, turned.
FASTKD_INLINE void put_sums(const Words64& sums, int32_t* out) {
    const __m512i* of = sums.of;
    const __m512i a = _mm512_shuffle_i32x4(of[0], of[1], 0x44), b = _mm512_shuffle_i32x4(of[0], of[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(of[2], of[3], 0x44), d = _mm512_shuffle_i32x4(of[2], of[3], 0xee);
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(out + W, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(out + 2 * W, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(out + 3 * W, _mm512_shuffle_i32x4(b, d, 0xdd));
}

// Pixels whose words are their own.
template <int pixels>
static void pixels_apart(const Int8Pixels& p, const char* numbers, int32_t* out) {
    const char* weights = p.weights;
    Words64 sums[pixels];
#pragma GCC unroll 4
    for (int i = 0; i < pixels; ++i) sums[i] = first_sums(weights);
    weights += kPixelWords;
    for (int64_t y = 0; y < p.kernel[0]; ++y) {
        for (int64_t tap = 0; tap <= p.kernel[1]; tap += 4, weights += 2 * kPixelWords) {
            int64_t at[4];  // a tap that is none has no weight
            for (int t = 0; t < 4; ++t) {
                at[t] = y * p.line + (tap + t < p.kernel[1] ? tap + t : p.kernel[1] - 1) * p.tap;
            }
#pragma GCC unroll 4
            for (int i = 0; i < pixels; ++i) {
                const char* from = numbers + i * p.pixel;
                add_words(sums[i], words_of(pair_of(from + at[0], from + at[1]), pair_of(from + at[2], from + at[3])), weights);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < pixels; ++i) put_sums(sums[i], out + i * kPixelChannels);
}

// Twice as many pixels, one tap apart: each two of them share words.
template <int pairs>
static void pixels_in_pairs(const Int8Pixels& p, const char* numbers, int32_t* out) {
    const char* weights = p.weights;
    Words64 sums[2 * pairs];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * pairs; ++i) sums[i] = first_sums(weights);
    weights += kPixelWords;
    for (int64_t y = 0; y < p.kernel[0]; ++y, numbers += p.line) {
        const char* from = numbers;
        for (int64_t tap = 0; tap <= p.kernel[1]; tap += 4, weights += 2 * kPixelWords, from += 4 * p.tap) {
            Pair64 pair = pair_of(from, from + p.tap);
#pragma GCC unroll 2
            for (int i = 0; i < pairs; ++i) {
                const Pair64 next = pair_of(from + (2 * i + 2) * p.tap, from + (2 * i + 3) * p.tap);
                const Words64 words = words_of(pair, next);
                add_words(sums[2 * i], words, weights);
                add_words(sums[2 * i + 1], words, weights + kPixelWords);
                pair = next;
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * pairs; ++i) put_sums(sums[i], out + i * kPixelChannels);
}

void int8_pixel_products(const Int8Pixels& p) {
    const bool paired = p.pixel == p.tap;
    const char* numbers = p.numbers;
    int32_t* out = p.sums;
    for (int64_t left = p.count; left > 0; left -= 4, numbers += 4 * p.pixel, out += 4 * kPixelChannels) {
        if (paired) {
            left > 2 ? pixels_in_pairs<2>(p, numbers, out) : pixels_in_pairs<1>(p, numbers, out);
            continue;
        }
        switch (left) {
            case 1: pixels_apart<1>(p, numbers, out); break;
            case 2: pixels_apart<2>(p, numbers, out); break;
            case 3: pixels_apart<3>(p, numbers, out); break;
            default: pixels_apart<4>(p, numbers, out);
        }
    }
}
#else
constexpr void (*int8_pixel_products)(const Int8Pixels&) = nullptr;
#endif

}  // namespace
}  // namespace fastkd
