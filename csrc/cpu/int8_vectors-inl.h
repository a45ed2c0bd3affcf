// Vectors of the int8 pieces: from and to tensors of any dtype, whole or in part, and squares of them turned. Included by
// one unit for each instruction set.
#pragma once
#include "int8.h"
#include "vec.h"

namespace fastkd {
namespace {

typedef int16_t vs __attribute__((vector_size(2 * W)));

// Between 8 and 32 bits in two steps, each to twice or half as many: gcc 12 takes a larger one element by element.
template <class Narrow>
FASTKD_INLINE vi widened(Narrow x) {
    return __builtin_convertvector(__builtin_convertvector(x, vs), vi);
}
template <class Narrow>
FASTKD_INLINE Narrow narrowed(vi x) {
    return __builtin_convertvector(__builtin_convertvector(x, vs), Narrow);
}

// n of W, and zeros: only whole vectors are read and written at once.
template <bool whole>
FASTKD_INLINE vf take_floats(const float* p, int64_t n) {
    if (whole) return load(p);
    vf x{};
    __builtin_memcpy(&x, p, n * sizeof(float));
    return x;
}

template <bool whole>
FASTKD_INLINE vf take(const void* p, Dtype dtype, int64_t at, int64_t n) {
    if (dtype == Dtype::float32) return take_floats<whole>(static_cast<const float*>(p) + at, n);
    vh x{};
    __builtin_memcpy(&x, static_cast<const uint16_t*>(p) + at, whole ? sizeof x : n * sizeof(uint16_t));
    return dtype == Dtype::bfloat16 ? widen_bfloat16(x) : widen_float16(x);
}

template <bool whole>
FASTKD_INLINE void put(void* p, Dtype dtype, int64_t at, int64_t n, vf y) {
    if (dtype == Dtype::float32) {
        __builtin_memcpy(static_cast<float*>(p) + at, &y, whole ? sizeof y : n * sizeof(float));
    } else {
        const vh x = dtype == Dtype::bfloat16 ? narrow_bfloat16(y) : narrow_float16(y);
        __builtin_memcpy(static_cast<uint16_t*>(p) + at, &x, whole ? sizeof x : n * sizeof(uint16_t));
    }
}

// To a whole vector's place, that is not read from memory before: to be followed by `__builtin_ia32_sfence`.
FASTKD_INLINE void store_past_caches(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}

#if defined(__clang__)
FASTKD_INLINE vi shuffled(vi a, vi b, vi from) {
    vi result;
    for (int lane = 0; lane < W; ++lane) result[lane] = from[lane] < W ? a[from[lane]] : b[from[lane] - W];
    return result;
}
#else
FASTKD_INLINE vi shuffled(vi a, vi b, vi from) { return __builtin_shuffle(a, b, from); }
#endif

// A square of W x W: each step swaps, at one distance, the blocks beside the diagonal.
template <int distance>
FASTKD_INLINE void swap_blocks(vi (&square)[W]) {
    vi first{}, second{};
    for (int lane = 0; lane < W; ++lane) {
        first[lane] = lane & distance ? W + lane - distance : lane;
        second[lane] = lane & distance ? W + lane : lane + distance;
    }
    for (int i = 0; i < W; ++i) {
        if (i & distance) continue;
        const vi a = square[i], b = square[i + distance];
        square[i] = shuffled(a, b, first);
        square[i + distance] = shuffled(a, b, second);
    }
}

FASTKD_INLINE void transpose(vi (&square)[W]) {
    swap_blocks<1>(square);
    swap_blocks<2>(square);
    if constexpr (W > 4) swap_blocks<4>(square);
    if constexpr (W > 8) swap_blocks<8>(square);
}

}  // namespace
}  // namespace fastkd
