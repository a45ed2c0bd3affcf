// Floats to int8 numbers, in words. Included by one unit for each instruction set.
#pragma once
#include "int8.h"
#include "tiles-inl.h"

namespace fastkd {
namespace {

#if defined(__AVX512VNNI__)
typedef uint8_t Number;
constexpr int kGroup = 4, kZero = 128;
#else
typedef int16_t Number;
constexpr int kGroup = 2, kZero = 0;
#endif
typedef Number vn __attribute__((vector_size(sizeof(Number) * W)));

// n floats from `begin` on, padded to whole vectors with -inf, which nobody keeps.
FASTKD_INLINE const float* floats_at(const void* x, Dtype dtype, int64_t begin, int64_t n, Tile& scratch) {
    const int64_t size = dtype == Dtype::float32 ? 4 : 2;
    return fetch({static_cast<const char*>(x) + begin * size, dtype}, 0, n, scratch);
}

uint32_t int8_largest(const void* x, Dtype dtype, int64_t n) {
    Tile scratch;
    vi most{};
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t m = n - begin < kTile ? n - begin : kTile, whole = m / W * W;
        const float* values = floats_at(x, dtype, begin, m, scratch);
        for (int64_t i = 0; i < whole; i += W) {
            const vi size = bits(load(values + i)) & 0x7fffffff;
            most = size > most ? size : most;
        }
        for (int64_t i = whole; i < m; ++i) {
            const vi size = bits(splat(values[i])) & 0x7fffffff;
            most = size > most ? size : most;
        }
    }
    uint32_t result = 0;
    for (int j = 0; j < W; ++j) result = (uint32_t)most[j] > result ? (uint32_t)most[j] : result;
    return result;
}

// Whole numbers from -127 to 127; whatever a NaN becomes, its row is NaN. The quotient is rounded, then the number: a
// product with 1 / step would now and then be another number than everybody else's.
FASTKD_INLINE vi levels(vf x, float step) {
    const vf clamped = at_most(at_least(x / splat(step), splat(-kLevels)), splat(kLevels));
    return __builtin_convertvector(round_to_even(clamped), vi);
}

void int8_quantize(const void* x, Dtype dtype, int64_t n, float step, void* numbers) {
    Number* out = static_cast<Number*>(numbers);
    Tile scratch;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t m = n - begin < kTile ? n - begin : kTile;
        const float* values = floats_at(x, dtype, begin, m, scratch);
        for (int64_t i = 0; i < m; i += W) {
            const vn packed = __builtin_convertvector(levels(load(values + i), step) + kZero, vn);
            const int64_t count = m - i < W ? m - i : W;
            if (count == W) {
                __builtin_memcpy(out + begin + i, &packed, sizeof packed);
            } else {
                __builtin_memcpy(out + begin + i, &packed, count * sizeof(Number));
            }
        }
    }
}

void int8_quantize_planes(const void* x, Dtype dtype, int64_t plane, int64_t channels, int64_t n, float step, char* out,
                          int64_t pixel) {
    constexpr int kBits = 32 / kGroup, kMask = (int)((1u << kBits) - 1);
    static_assert(kMask == 255 || kMask == 65535, "a word holds four numbers or two");
    Tile scratch[kGroup];
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t m = n - begin < kTile ? n - begin : kTile;
        for (int64_t c = 0; c < channels; c += kGroup) {
            const int present = channels - c < kGroup ? (int)(channels - c) : kGroup;
            const float* values[kGroup];
            for (int j = 0; j < present; ++j) values[j] = floats_at(x, dtype, (c + j) * plane + begin, m, scratch[j]);
            char* words = out + begin * pixel + c / kGroup * 4;
            for (int64_t i = 0; i < m; i += W) {
                vi packed{};
                for (int j = 0; j < kGroup; ++j) {
                    const vi level = j < present ? levels(load(values[j] + i), step) : vi{};
                    packed |= ((level + kZero) & kMask) << (j * kBits);
                }
                const int64_t count = m - i < W ? m - i : W;
                for (int64_t p = 0; p < count; ++p) {
                    const int32_t word = packed[p];
                    __builtin_memcpy(words + (i + p) * pixel, &word, sizeof word);
                }
            }
        }
    }
}

}  // namespace
}  // namespace fastkd
