// Floats to int8 numbers, in words. Included by one unit for each instruction set.
#pragma once
#include "int8_vectors-inl.h"

namespace fastkd {
namespace {

#if defined(__AVX512VNNI__)
typedef uint8_t Number;
constexpr int kPerWord = 4, kZero = 128;
#else
typedef int16_t Number;
constexpr int kPerWord = 2, kZero = 0;
#endif
typedef Number vn __attribute__((vector_size(sizeof(Number) * W)));

FASTKD_INLINE vi larger(vi most, vf x) {
    const vi size = bits(x) & 0x7fffffff;
    return size > most ? size : most;
}

FASTKD_INLINE uint32_t largest_lane(vi most) {
    int32_t result = 0;
    for (int j = 0; j < W; ++j) result = most[j] > result ? most[j] : result;
    return (uint32_t)result;
}

uint32_t int8_largest(const void* x, Dtype dtype, int64_t n) {
    vi most{};
    int64_t i = 0;
    for (; i + W <= n; i += W) most = larger(most, take<true>(x, dtype, i, W));
    if (i < n) most = larger(most, take<false>(x, dtype, i, n - i));
    return largest_lane(most);
}

// Whole numbers from -127 to 127; whatever a NaN becomes, its row is NaN. The quotient is rounded, then the number: a
// product with 1 / step would now and then be another number than everybody else's.
FASTKD_INLINE vi levels(vf x, vf step) {
    const vf clamped = at_most(at_least(x / step, splat(-kLevels)), splat(kLevels));
    return __builtin_convertvector(round_to_even(clamped), vi);
}

uint32_t int8_quantize(const void* x, Dtype dtype, int64_t n, float step, void* numbers) {
    Number* out = static_cast<Number*>(numbers);
    const vf by = splat(step);
    vi most{};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vf value = take<true>(x, dtype, i, W);
        const vn packed = narrowed<vn>(levels(value, by) + kZero);
        __builtin_memcpy(out + i, &packed, sizeof packed);
        most = larger(most, value);
    }
    if (i < n) {
        const vf value = take<false>(x, dtype, i, n - i);
        const vn packed = narrowed<vn>(levels(value, by) + kZero);
        __builtin_memcpy(out + i, &packed, (n - i) * sizeof(Number));
        most = larger(most, value);
    }
    return largest_lane(most);
}

// One word of each of W pixels.
template <bool whole>
FASTKD_INLINE vi word_of_planes(const void* x, Dtype dtype, int64_t plane, int64_t present, int64_t at, int64_t n, vf by,
                                vi& most) {
    constexpr int kBits = 32 / kPerWord, kMask = kBits == 8 ? 0xff : 0xffff;
    vi word{};
    for (int j = 0; j < kPerWord; ++j) {
        const vf value = j < present ? take<whole>(x, dtype, j * plane + at, n) : vf{};
        word |= ((levels(value, by) + kZero) & kMask) << (j * kBits);
        most = larger(most, value);
    }
    return word;
}

constexpr int64_t kPixels = 256;  // of each plane at a time: a run that is long enough to be fetched ahead

struct Turned {
    alignas(64) int32_t words[W][kPixels];
};

// `count` of the words of n pixels from `begin` on.
static void read_planes(const Int8Planes& p, int64_t first, int64_t count, int64_t begin, int64_t n, Turned& out, vi& most) {
    const int64_t size = p.dtype == Dtype::float32 ? 4 : 2;
    const vf by = splat(p.step);
    for (int64_t k = 0; k < count; ++k) {
        const int64_t c = (first + k) * kPerWord, present = p.channels - c;
        const void* x = static_cast<const char*>(p.x) + (c * p.plane + begin) * size;
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            const vi word = word_of_planes<true>(x, p.dtype, p.plane, present, i, W, by, most);
            __builtin_memcpy(out.words[k] + i, &word, sizeof word);
        }
        if (i == n) continue;
        const vi word = word_of_planes<false>(x, p.dtype, p.plane, present, i, n - i, by, most);
        __builtin_memcpy(out.words[k] + i, &word, sizeof word);
    }
}

// The words of n pixels to where the pixels are: `y` and `x` are those of the first, then of the one behind the last.
static void write_pixels(const Int8Planes& p, int64_t first, int64_t count, int64_t n, const Turned& in, int64_t& y, int64_t& x) {
    for (int64_t i = 0; i < n; i += W) {
        vi square[W]{};
        for (int64_t k = 0; k < count; ++k) __builtin_memcpy(&square[k], in.words[k] + i, sizeof(vi));
        transpose(square);
        for (int64_t j = 0; j < (n - i < W ? n - i : W); ++j) {
            char* to = p.words + y * p.line_bytes + x * p.pixel_bytes + first * 4;
            if (count == W) {
                __builtin_memcpy(to, &square[j], sizeof(vi));
            } else {
                __builtin_memcpy(to, &square[j], count * 4);
            }
            if (++x == p.width) x = 0, ++y;
        }
    }
}

uint32_t int8_quantize_planes(const Int8Planes& p) {
    const int64_t pixels = p.width * p.lines, words = (p.channels + kPerWord - 1) / kPerWord;
    Turned turned;
    vi most{};
    for (int64_t first = 0; first < words; first += W) {
        const int64_t count = words - first < W ? words - first : W;
        int64_t y = 0, x = 0;
        for (int64_t begin = 0; begin < pixels; begin += kPixels) {
            const int64_t n = pixels - begin < kPixels ? pixels - begin : kPixels;
            read_planes(p, first, count, begin, n, turned, most);
            write_pixels(p, first, count, n, turned, y, x);
        }
    }
    return largest_lane(most);
}

}  // namespace
}  // namespace fastkd
