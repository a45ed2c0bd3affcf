// From integer sums to the output of an int8 layer. Included by one unit for each instruction set.
//
// Every product is rounded by itself, so that each instruction set gives the same bits: `times`, and no fused additions.
#pragma once
#include "int8_vectors-inl.h"

namespace fastkd {
namespace {

FASTKD_INLINE vf times(vf a, vf b) { return rounded(a * b); }

// e^x = mantissa * 2^exponent for -106 <= x <= 0: Cephes expf.
struct Exponential {
    vf mantissa;
    vi exponent;
};

FASTKD_INLINE Exponential exponential(vf x) {
    const vf n = round_to_even(times(x, splat(kLog2e)));
    const vf f = x - times(n, splat(0.693359375f)) - times(n, splat(-2.12194440e-4f));
    vf p = splat(1.9875691500e-4f);
    p = times(p, f) + 1.3981999507e-3f;
    p = times(p, f) + 8.3334519073e-3f;
    p = times(p, f) + 4.1665795894e-2f;
    p = times(p, f) + 1.6666665459e-1f;
    p = times(p, f) + 5.0000001201e-1f;
    return {times(times(p, f), f) + f + 1.0f, __builtin_convertvector(n, vi)};
}

FASTKD_INLINE vf power_of_two(vi n) { return bits((n + 127) << 23); }

// x / (1 + e^-v) for v of the sign of x; 0 below -89, where float32 arithmetic has 0 too. Neither side loses the digits of
// a small result, and nothing between is smaller than the smallest normal float: hence the 16.
FASTKD_INLINE vf gated(vf x, vf v) {
    const Exponential e = exponential(at_least(bits(bits(v) | (vi{} + INT32_MIN)), splat(-90.0f)));
    const vi negative = v < 0.0f;
    const vf power = power_of_two(e.exponent + 4), small = times(e.mantissa, power);
    const vf divisor = times(small, splat(0.0625f)) + 1.0f;
    const vf below = times(times(times(x, splat(0.0625f)), e.mantissa) / divisor, power);
    return select(v < -89.0f, vf{}, select(negative, below, x / divisor));
}

// x Phi(x): Phi(-y) = e^(-y^2 / 2) t q(t) with t = 1 / (1 + 0.35 y), of relative error 2e-7. It ends below the smallest
// float; 2^32 lets the power of two be a normal one there.
FASTKD_INLINE vf gelu(vf x) {
    const vf y = at_most(abs(x), splat(14.5f)), t = splat(1.0f) / (times(y, splat(0.35f)) + 1.0f);
    vf q = splat(-0.0291580297f);
    q = times(q, t) + 0.144031614f;
    q = times(q, t) - 0.255840391f;
    q = times(q, t) + 0.159321249f;
    q = times(q, t) - 0.0232133921f;
    q = times(q, t) + 0.105552927f;
    q = times(q, t) + 0.119821183f;
    q = times(q, t) + 0.139863536f;
    q = times(q, t) + 0.139621302f;
    const Exponential e = exponential(times(times(y, y), splat(-0.5f)));
    const vf power = power_of_two(e.exponent + 32), tail = times(times(times(q, t), e.mantissa), splat(2.328306437e-10f));
    return select(x < -14.5f, vf{}, select(x < 0.0f, times(times(x, tail), power), times(x, 1.0f - times(tail, power))));
}

FASTKD_INLINE vf gelu_tanh(vf x) {
    const vf cube = times(times(times(x, x), x), splat(0.044715f));
    return gated(x, times(x + cube, splat(1.59576912160573071f)));
}

template <Activation activation>
FASTKD_INLINE vf activated(vf y) {
    if (activation == Activation::relu) return at_least(y, splat(0.0f));
    if (activation == Activation::gelu) return gelu(y);
    if (activation == Activation::gelu_tanh) return gelu_tanh(y);
    if (activation == Activation::silu) return gated(y, y);
    return y;
}

// Whole vectors, even at the end of a line: it is padded.
FASTKD_INLINE vf take_sums(const void* sums, bool floats, int64_t at) {
    vi x;
    __builtin_memcpy(&x, static_cast<const int32_t*>(sums) + at, sizeof x);
    return floats ? bits(x) : __builtin_convertvector(x, vf);
}

FASTKD_INLINE vf dequantized(vf sums, vf scale, vf step) { return times(times(sums, scale), step); }

// `plain`: float32 without a residual, which leaves little to decide for each vector.
template <Activation activation, bool plain, bool whole>
FASTKD_INLINE void finish_vector(const Int8Lines& l, int64_t line, int64_t c, vf step, vf scale, vf bias) {
    const int64_t n = l.columns - c;
    const Dtype dtype = plain ? Dtype::float32 : l.dtype;
    vf y = dequantized(take_sums(l.sums, l.floats, line * l.pitch + c), scale, step);
    if (l.bias) y += bias;
    if (!plain && l.residual) y += take<whole>(l.residual, dtype, line * l.residual_stride + c, n);
    const int64_t at = line * l.output_stride + c;
    y = activated<activation>(y);
    if (plain && whole && l.stores == Stores::past_caches) return store_past_caches(static_cast<float*>(l.output) + at, y);
    put<whole>(l.output, dtype, at, n, y);
}

// Channels are columns, of one block: what belongs to them stays in registers. Line by line, for with lines a power of two
// apart all of a column would compete for the same few places in the cache.
template <Activation activation, bool plain, int vectors>
static void finish_rows(const Int8Lines& lines) {
    const Int8Lines l = lines;  // what is written to the output cannot change a copy, and the compiler knows it
    constexpr int64_t kWhole = vectors * W;
    const int64_t rest = l.columns - kWhole;
    vf scale[vectors + 1]{}, bias[vectors + 1]{};
    for (int v = 0; v < vectors; ++v) {
        scale[v] = load(l.scale + v * W);
        if (l.bias) bias[v] = load(l.bias + v * W);
    }
    if (rest > 0) {
        scale[vectors] = take_floats<false>(l.scale + kWhole, rest);
        if (l.bias) bias[vectors] = take_floats<false>(l.bias + kWhole, rest);
    }
    for (int64_t line = 0; line < l.lines; ++line) {
        const vf step = splat(l.steps[line * l.steps_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) finish_vector<activation, plain, true>(l, line, v * W, step, scale[v], bias[v]);
        if (rest > 0) finish_vector<activation, plain, false>(l, line, kWhole, step, scale[vectors], bias[vectors]);
    }
}

template <Activation activation, bool plain>
static void finish_rows(const Int8Lines& l) {
    switch (l.columns / W) {
        case 0: return finish_rows<activation, plain, 0>(l);
        case 1: return finish_rows<activation, plain, 1>(l);
        case 2: return finish_rows<activation, plain, 2>(l);
        case 3: return finish_rows<activation, plain, 3>(l);
        case 4: return finish_rows<activation, plain, 4>(l);
    }
}

template <Activation activation, bool plain>
static void finish_planes(const Int8Lines& lines) {
    const Int8Lines l = lines;
    for (int64_t line = 0; line < l.lines; ++line) {
        const vf step = splat(l.steps[line * l.steps_stride]);
        const vf scale = splat(l.scale[line]), bias = splat(l.bias ? l.bias[line] : 0);
        int64_t c = 0;
        for (; c + W <= l.columns; c += W) finish_vector<activation, plain, true>(l, line, c, step, scale, bias);
        if (c < l.columns) finish_vector<activation, plain, false>(l, line, c, step, scale, bias);
    }
}

template <int rows, int panels, bool past_caches>
FASTKD_INLINE void finish_registers(const Int8Lines& lines, int64_t column, const vi (&sums)[rows * panels]) {
    const Int8Lines l = lines;
    const float *scale = l.scale + column, *bias = l.bias + column;
    const vf least = splat(l.activation == Activation::relu ? 0.0f : -__builtin_inff());
    float* out = static_cast<float*>(l.output) + column;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r, out += l.output_stride) {
        const vf step = splat(l.steps[r * l.steps_stride]);
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) {
            const vf x = __builtin_convertvector(sums[r * panels + p], vf);
            const vf y = at_least(dequantized(x, load(scale + p * W), step) + load(bias + p * W), least);
            past_caches ? store_past_caches(out + p * W, y) : store(out + p * W, y);
        }
    }
}

// Sums that are still in registers.
template <int rows, int panels>
FASTKD_INLINE void finish_tile(const Int8Lines& l, int64_t column, const vi (&sums)[rows * panels]) {
    l.stores == Stores::past_caches ? finish_registers<rows, panels, true>(l, column, sums)
                                    : finish_registers<rows, panels, false>(l, column, sums);
}

template <Activation activation>
static void finish(const Int8Lines& l) {
    const bool plain = l.dtype == Dtype::float32 && !l.residual;
    if (l.channels_are_lines) {
        plain ? finish_planes<activation, true>(l) : finish_planes<activation, false>(l);
    } else {
        plain ? finish_rows<activation, true>(l) : finish_rows<activation, false>(l);
    }
}

void int8_finish(const Int8Lines& l) {
    switch (l.activation) {
        case Activation::none: return finish<Activation::none>(l);
        case Activation::relu: return finish<Activation::relu>(l);
        case Activation::gelu: return finish<Activation::gelu>(l);
        case Activation::gelu_tanh: return finish<Activation::gelu_tanh>(l);
        case Activation::silu: return finish<Activation::silu>(l);
    }
}

void int8_transpose(const int32_t* sums, int64_t rows, int64_t columns, int32_t* out, int64_t pitch) {
    for (int64_t r = 0; r < rows; r += W) {
        const int64_t n = rows - r < W ? rows - r : W;
        for (int64_t c = 0; c < columns; c += W) {
            vi square[W]{};
            for (int i = 0; i < n; ++i) __builtin_memcpy(&square[i], sums + (r + i) * columns + c, sizeof(vi));
            transpose(square);
            for (int i = 0; i < W; ++i) __builtin_memcpy(out + (c + i) * pitch + r, &square[i], sizeof(vi));
        }
    }
}

}  // namespace
}  // namespace fastkd
