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

constexpr int kAtOnce = 4;  // vectors, none of which waits for another

template <Dtype dtype>
static uint32_t largest(const void* x, int64_t n) {
    vi most[kAtOnce]{};
    int64_t i = 0;
    for (; i + kAtOnce * W <= n; i += kAtOnce * W) {
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) most[j] = larger(most[j], take<true>(x, dtype, i + j * W, W));
    }
    for (; i + W <= n; i += W) most[0] = larger(most[0], take<true>(x, dtype, i, W));
    if (i < n) most[0] = larger(most[0], take<false>(x, dtype, i, n - i));
    for (int j = 1; j < kAtOnce; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
    return largest_lane(most[0]);
}

uint32_t int8_largest(const void* x, Dtype dtype, int64_t n) {
    switch (dtype) {
        case Dtype::float32: return largest<Dtype::float32>(x, n);
        case Dtype::bfloat16: return largest<Dtype::bfloat16>(x, n);
        case Dtype::float16: return largest<Dtype::float16>(x, n);
    }
    return 0;
}

// The quotient is rounded, then the number: a product with 1 / step would now and then be another number than everybody
// else's. A division takes as long as ten products, so the quotient is that product, corrected by what it leaves over. It is
// off by less than 2^-22 of its last bit before it is rounded, and no two floats have a quotient so near to where the number
// changes that this would matter (tests/test_int8_linear.py goes through those that come nearest), as long as nothing
// overflows or is denormal on the way.
struct Divisor {
    vf step, inverse, most;
    bool corrected;
};

FASTKD_INLINE Divisor divisor(float step) {
#if defined(__FMA__)
    const bool corrected = step > 0x1p-60f && step < 0x1p60f;
#else
    const bool corrected = false;
#endif
    // What is clamped is x: nothing is too large then, and 127.25 steps become 127.
    return {splat(step), splat(1.0f) / splat(step), splat(step * (kLevels + 0.25f)), corrected};
}

template <bool corrected>
FASTKD_INLINE vf quotient(vf x, const Divisor& d) {
#if defined(__AVX512F__)
    if (corrected) {
        const __m512 step = (__m512)d.step, inverse = (__m512)d.inverse, first = _mm512_mul_ps((__m512)x, inverse);
        return (vf)_mm512_fmadd_ps(_mm512_fnmadd_ps(first, step, (__m512)x), inverse, first);
    }
#elif defined(__FMA__)
    if (corrected) {
        const __m256 step = (__m256)d.step, inverse = (__m256)d.inverse, first = _mm256_mul_ps((__m256)x, inverse);
        return (vf)_mm256_fmadd_ps(_mm256_fnmadd_ps(first, step, (__m256)x), inverse, first);
    }
#endif
    return x / d.step;
}

// Whole numbers from -127 to 127, and kZero more, in the lowest bits; whatever a NaN becomes, its row is NaN. `bounded`: no
// x is more than 127 steps.
template <bool corrected, bool bounded>
FASTKD_INLINE vi levels(vf x, const Divisor& d) {
    const vf y = quotient<corrected>(bounded ? x : at_most(at_least(x, -d.most), d.most), d);
    return bits(rounded(y + splat(12582912.0f + kZero)));  // 1.5 * 2^23: what is behind the point is rounded away, half to even
}

FASTKD_INLINE vn lowest_bits(vi x) {
#if defined(__AVX512VNNI__)
    return (vn)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return narrowed<vn>(x);
#endif
}

template <Dtype dtype, bool corrected, bool bounded, bool whole>
FASTKD_INLINE void quantize_vector(const void* x, int64_t at, int64_t n, const Divisor& by, Number* out, vi& most) {
    const vf value = take<whole>(x, dtype, at, n);
    const vn packed = lowest_bits(levels<corrected, bounded>(value, by));
    __builtin_memcpy(out + at, &packed, whole ? sizeof packed : n * sizeof(Number));
    if (!bounded) most = larger(most, value);
}

template <Dtype dtype, bool corrected, bool bounded>
static uint32_t quantize(const void* x, int64_t n, const Divisor& given, Number* out) {
    const Divisor by = given;  // what is written cannot change a copy
    vi most{};
    int64_t i = 0;
    for (; i + kAtOnce * W <= n; i += kAtOnce * W) {
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) quantize_vector<dtype, corrected, bounded, true>(x, i + j * W, W, by, out, most);
    }
    for (; i + W <= n; i += W) quantize_vector<dtype, corrected, bounded, true>(x, i, W, by, out, most);
    if (i < n) quantize_vector<dtype, corrected, bounded, false>(x, i, n - i, by, out, most);
    return largest_lane(most);
}

template <Dtype dtype, bool bounded>
FASTKD_INLINE uint32_t quantize(const void* x, int64_t n, float step, void* numbers) {
    const Divisor by = divisor(step);
    Number* out = static_cast<Number*>(numbers);
    // Where steps are denormal, a row's own is only roughly a 127th of its largest number.
    return by.corrected ? quantize<dtype, true, bounded>(x, n, by, out) : quantize<dtype, false, false>(x, n, by, out);
}

template <bool bounded>
FASTKD_INLINE uint32_t quantize(const void* x, Dtype dtype, int64_t n, float step, void* numbers) {
    switch (dtype) {
        case Dtype::float32: return quantize<Dtype::float32, bounded>(x, n, step, numbers);
        case Dtype::bfloat16: return quantize<Dtype::bfloat16, bounded>(x, n, step, numbers);
        case Dtype::float16: return quantize<Dtype::float16, bounded>(x, n, step, numbers);
    }
    return 0;
}

uint32_t int8_quantize(const void* x, Dtype dtype, int64_t n, float step, void* numbers) {
    return quantize<false>(x, dtype, n, step, numbers);
}

void int8_quantize_bounded(const void* x, Dtype dtype, int64_t n, float step, void* numbers) {
    quantize<true>(x, dtype, n, step, numbers);
}

// One word of each of W pixels.
template <Dtype dtype, bool corrected, bool bounded, bool whole>
FASTKD_INLINE vi word_of_planes(const void* x, int64_t plane, int64_t present, int64_t at, int64_t n, const Divisor& by,
                                vi& most) {
    constexpr int kBits = 32 / kPerWord, kMask = kBits == 8 ? 0xff : 0xffff;
    vi word{};
    for (int j = 0; j < kPerWord; ++j) {
        const vf value = j < present ? take<whole>(x, dtype, j * plane + at, n) : vf{};
        word |= (levels<corrected, bounded>(value, by) & kMask) << (j * kBits);
        if (!bounded) most = larger(most, value);
    }
    return word;
}

constexpr int64_t kPixels = 256;  // of each plane at a time: a run that is long enough to be fetched ahead

struct Turned {
    alignas(64) int32_t words[W][kPixels];
};

// `count` of the words of n pixels from `begin` on.
template <Dtype dtype, bool corrected, bool bounded>
static void read_planes(const Int8Planes& p, const Divisor& by, int64_t first, int64_t count, int64_t begin, int64_t n,
                        Turned& out, vi& most) {
    constexpr int64_t kSize = dtype == Dtype::float32 ? 4 : 2;
    for (int64_t k = 0; k < count; ++k) {
        const int64_t c = (first + k) * kPerWord, present = p.channels - c;
        const void* x = static_cast<const char*>(p.x) + (c * p.plane + begin) * kSize;
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            const vi word = word_of_planes<dtype, corrected, bounded, true>(x, p.plane, present, i, W, by, most);
            __builtin_memcpy(out.words[k] + i, &word, sizeof word);
        }
        if (i == n) continue;
        const vi word = word_of_planes<dtype, corrected, bounded, false>(x, p.plane, present, i, n - i, by, most);
        __builtin_memcpy(out.words[k] + i, &word, sizeof word);
    }
}

// The words of n pixels to where the pixels are: `y` and `x` are those of the first, then of the one behind the last. Where
// pixels are shorter than their words, each is written over what the one before left there, and the last of a line alone.
static void write_pixels(const Int8Planes& p, int64_t first, int64_t count, int64_t n, const Turned& in, int64_t& y, int64_t& x) {
    const int64_t own = p.pixel_bytes - first * 4;
    if (count == 1) {
        for (int64_t i = 0; i < n; ++i) {
            char* to = p.words + y * p.line_bytes + x * p.pixel_bytes + first * 4;
            if (++x == p.width) {
                __builtin_memcpy(to, in.words[0] + i, own < 4 ? own : 4);
                x = 0, ++y;
            } else {
                __builtin_memcpy(to, in.words[0] + i, 4);
            }
        }
        return;
    }
    for (int64_t i = 0; i < n; i += W) {
        vi square[W]{};
        for (int64_t k = 0; k < count; ++k) __builtin_memcpy(&square[k], in.words[k] + i, sizeof(vi));
        transpose(square);
        for (int64_t j = 0; j < (n - i < W ? n - i : W); ++j) {
            char* to = p.words + y * p.line_bytes + x * p.pixel_bytes + first * 4;
            const bool last = ++x == p.width;
            if (last && own < count * 4) {
                __builtin_memcpy(to, &square[j], own);
            } else if (count == W) {
                __builtin_memcpy(to, &square[j], sizeof(vi));
            } else {
                __builtin_memcpy(to, &square[j], count * 4);
            }
            if (last) x = 0, ++y;
        }
    }
}

template <Dtype dtype, bool corrected, bool bounded>
static uint32_t quantize_planes(const Int8Planes& p, const Divisor& by) {
    const int64_t pixels = p.width * p.lines, words = (p.channels + kPerWord - 1) / kPerWord;
    Turned turned;
    vi most{};
    for (int64_t first = 0; first < words; first += W) {
        const int64_t count = words - first < W ? words - first : W;
        int64_t y = 0, x = 0;
        for (int64_t begin = 0; begin < pixels; begin += kPixels) {
            const int64_t n = pixels - begin < kPixels ? pixels - begin : kPixels;
            read_planes<dtype, corrected, bounded>(p, by, first, count, begin, n, turned, most);
            write_pixels(p, first, count, n, turned, y, x);
        }
    }
    return largest_lane(most);
}

template <Dtype dtype>
FASTKD_INLINE uint32_t quantize_planes(const Int8Planes& p) {
    const Divisor by = divisor(p.step);
    if (!by.corrected) return quantize_planes<dtype, false, false>(p, by);
    return p.bounded ? quantize_planes<dtype, true, true>(p, by) : quantize_planes<dtype, true, false>(p, by);
}

uint32_t int8_quantize_planes(const Int8Planes& p) {
    switch (p.dtype) {
        case Dtype::float32: return quantize_planes<Dtype::float32>(p);
        case Dtype::bfloat16: return quantize_planes<Dtype::bfloat16>(p);
        case Dtype::float16: return quantize_planes<Dtype::float16>(p);
    }
    return 0;
}

}  // namespace
}  // namespace fastkd
