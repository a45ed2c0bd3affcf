// Floats to int8 numbers, and rows of int8 numbers that begin anywhere.
#pragma once
#include "instructions.cuh"
#include "int8.h"

namespace fastkd::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu, kInfiniteBits = 0x7f800000u;

struct Input {
    const void* data;
    int64_t terms, stride;
    Dtype dtype;
    bool vectors;        // rows are aligned to 16 bytes
    const float* given;  // or null
};

constexpr int kEight = 8;

struct Eight {
    float at[kEight];
};

__device__ inline float from_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ inline float float_at(const void* x, Dtype dtype, int64_t i) {
    if (dtype == Dtype::float32) return static_cast<const float*>(x)[i];
    const uint16_t bits = static_cast<const uint16_t*>(x)[i];
    return dtype == Dtype::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

__device__ inline void widen(uint32_t pair, Dtype dtype, float& first, float& second) {
    const auto low = static_cast<uint16_t>(pair & 0xffffu), high = static_cast<uint16_t>(pair >> 16);
    first = dtype == Dtype::bfloat16 ? from_bfloat16(low) : from_float16(low);
    second = dtype == Dtype::bfloat16 ? from_bfloat16(high) : from_float16(high);
}

// Numbers k to k + 7 of a row, 0 beyond its end.
__device__ inline Eight eight_at(const Input& in, int64_t row, int64_t k) {
    Eight x;
    const int64_t size = in.dtype == Dtype::float32 ? 4 : 2;
    const char* address = static_cast<const char*>(in.data) + (row * in.stride + k) * size;
    if (!in.vectors || k + kEight > in.terms) {
#pragma unroll
        for (int j = 0; j < kEight; ++j) x.at[j] = k + j < in.terms ? float_at(address, in.dtype, j) : 0.0f;
    } else if (in.dtype == Dtype::float32) {
        const float4 a = reinterpret_cast<const float4*>(address)[0], b = reinterpret_cast<const float4*>(address)[1];
        x = {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    } else {
        const uint4 a = *reinterpret_cast<const uint4*>(address);
        widen(a.x, in.dtype, x.at[0], x.at[1]), widen(a.y, in.dtype, x.at[2], x.at[3]);
        widen(a.z, in.dtype, x.at[4], x.at[5]), widen(a.w, in.dtype, x.at[6], x.at[7]);
    }
    return x;
}

// The bits of the largest magnitude, as a float: those of a NaN are above infinity's.
__device__ inline uint32_t largest(uint32_t most, const Eight& x) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) most = max(most, __float_as_uint(x.at[j]) & 0x7fffffffu);
    return most;
}

__device__ inline uint32_t warp_largest(uint32_t most) {
    for (int lanes = 16; lanes > 0; lanes /= 2) most = max(most, __shfl_xor_sync(kWholeWarp, most, lanes));
    return most;
}

// What one step of a row stands for: NaN for a row that is not finite, and for a given step that is no step.
__device__ inline float step_of(uint32_t most, const float* given) {
    const float nan = __uint_as_float(0x7fc00000u);
    if (most >= kInfiniteBits) return nan;
    if (given == nullptr) return __uint_as_float(most) / static_cast<float>(kLevels);
    return *given > 0 && __float_as_uint(*given) < kInfiniteBits ? *given : nan;
}

// A product with 1 / step is off by less than 2^-16 up to 127 steps. Near the middle of two numbers that may decide, so it
// is divided there, which rounds as everybody else does; elsewhere division would be most of the work.
__device__ inline uint32_t level(float x, float step, float inverse) {
    float steps = __fmul_rn(x, inverse);
    if (!(fabsf(fabsf(steps - rintf(steps)) - 0.5f) > 1e-4f)) steps = x / step;
    return static_cast<uint32_t>(static_cast<int>(rintf(fmaxf(fminf(steps, kLevels), -kLevels)))) & 0xffu;
}

// A row without a step has the numbers 0.
__device__ inline uint2 levels(const Eight& x, float step) {
    uint32_t words[2] = {0, 0};
    const float inverse = 1.0f / step;
    if (step > 0) {
#pragma unroll
        for (int j = 0; j < kEight; ++j) words[j / 4] |= level(x.at[j], step, inverse) << (j % 4 * 8);
    }
    return make_uint2(words[0], words[1]);
}

// The word at an aligned address, of whose bytes those from `begin` on and before `end` are read; the others are 0.
__device__ inline uint32_t word_within(const char* address, const char* begin, const char* end) {
    if (address >= begin && address + 4 <= end) return *reinterpret_cast<const uint32_t*>(address);
    uint32_t word = 0;
#pragma unroll 1
    for (int b = 0; b < 4; ++b) {
        const char* byte = address + b;
        if (byte >= begin && byte < end) word |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(byte)) << (8 * b);
    }
    return word;
}

// Numbers k to k + 15 of a row of int8 numbers, 0 beyond its end.
template <bool aligned>
__device__ inline uint4 sixteen_at(const int8_t* row, int64_t k, int64_t terms) {
    if (k >= terms) return make_uint4(0, 0, 0, 0);
    if (aligned) return *reinterpret_cast<const uint4*>(row + k);
    const char *begin = reinterpret_cast<const char*>(row), *end = begin + terms, *first = begin + k;
    const auto odd = static_cast<unsigned>(reinterpret_cast<uintptr_t>(first) % 4);
    uint32_t words[5];
#pragma unroll
    for (int j = 0; j < 5; ++j) words[j] = word_within(first - odd + 4 * j, begin, end);
    const auto shifted = [&](int j) { return __funnelshift_r(words[j], words[j + 1], 8 * odd); };
    return make_uint4(shifted(0), shifted(1), shifted(2), shifted(3));
}

}  // namespace fastkd::cuda
