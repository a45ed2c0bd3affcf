// From integer sums to the output. Each operation is rounded by itself: no product is fused with a sum.
#pragma once
#include "int8_numbers.cuh"

namespace fastkd::cuda {

struct Epilogue {
    const float *scale, *bias;
    const void* residual;
    void* output;
    int64_t columns, residual_stride;
    Dtype dtype;
    Activation activation;
    bool vectors;  // four columns of the output are aligned
};

constexpr int kFour = 4;

// What belongs to four columns.
struct Channels {
    float scale[kFour], bias[kFour];
};

__device__ inline Channels channels_at(const Epilogue& e, int64_t column) {
    Channels of;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        const bool inside = column + j < e.columns;
        of.scale[j] = inside ? e.scale[column + j] : 0.0f;
        of.bias[j] = inside && e.bias != nullptr ? e.bias[column + j] : 0.0f;
    }
    return of;
}

// x / (1 + e^-v), without losing the digits of small results; v has the sign of x.
__device__ inline float gated(float x, float v) {
    const float e = expf(-fabsf(v));
    return v < 0 ? x * (e / (1.0f + e)) : x / (1.0f + e);
}

__device__ inline float activated(float y, Activation activation) {
    if (activation == Activation::none) return y;
    if (activation == Activation::relu) return y < 0 ? 0.0f : y;
    if (__float_as_uint(y) == (kInfiniteBits | 0x80000000u)) return 0.0f;
    if (activation == Activation::gelu) return y * (0.5f * erfcf(y * -0.70710678118654752440f));
    if (activation == Activation::silu) return gated(y, y);
    return gated(y, 1.59576912160573071f * (y + 0.044715f * y * y * y));
}

__device__ inline float as_float(int sum) { return static_cast<float>(sum); }
__device__ inline float as_float(int64_t sum) { return static_cast<float>(sum); }

__device__ inline uint16_t to_sixteen_bits(float y, Dtype dtype) {
    return dtype == Dtype::bfloat16 ? to_bfloat16(y) : to_float16(y);
}

__device__ inline void put_four(const Epilogue& e, int64_t row, int64_t column, const float (&y)[kFour]) {
    const int64_t at = row * e.columns + column;
    if (e.dtype == Dtype::float32) {
        float* out = static_cast<float*>(e.output) + at;
        if (e.vectors) {
            *reinterpret_cast<float4*>(out) = make_float4(y[0], y[1], y[2], y[3]);
            return;
        }
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            if (column + j < e.columns) out[j] = y[j];
        }
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(e.output) + at;
    uint16_t bits[kFour];
#pragma unroll
    for (int j = 0; j < kFour; ++j) bits[j] = to_sixteen_bits(y[j], e.dtype);
    if (e.vectors) {
        const auto pair = [&](int j) { return static_cast<uint32_t>(bits[j]) | static_cast<uint32_t>(bits[j + 1]) << 16; };
        *reinterpret_cast<uint2*>(out) = make_uint2(pair(0), pair(2));
        return;
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        if (column + j < e.columns) out[j] = bits[j];
    }
}

template <class Sum>
__device__ inline void finish_four(const Epilogue& e, const Channels& of, int64_t row, int64_t column, float step,
                                   const Sum (&sums)[kFour]) {
    float y[kFour];
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        y[j] = __fmul_rn(__fmul_rn(as_float(sums[j]), of.scale[j]), step);
        if (e.bias != nullptr) y[j] = __fadd_rn(y[j], of.bias[j]);
        if (e.residual != nullptr && column + j < e.columns) {
            y[j] = __fadd_rn(y[j], float_at(e.residual, e.dtype, row * e.residual_stride + column + j));
        }
        y[j] = activated(y[j], e.activation);
    }
    put_four(e, row, column, y);
}

}  // namespace fastkd::cuda
