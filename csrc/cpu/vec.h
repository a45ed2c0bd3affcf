// A vector of floats for the instruction set that this unit is compiled for. Only C headers are included, and everything
// has internal linkage: an inline function shared between units could reach an old processor with AVX-512 inside.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTKD_INLINE static inline __attribute__((always_inline))

namespace fastkd {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2 and NEON
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

FASTKD_INLINE vf splat(float x) { return x - vf{}; }
// x, rounded: no compiler may fuse the product that gave it into a later sum.
FASTKD_INLINE vf rounded(vf x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));  // any of 32 registers: x is the first 16
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}
FASTKD_INLINE vf load(const float* p) {
    vf x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
FASTKD_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
FASTKD_INLINE vf bits(vi x) { return (vf)x; }
FASTKD_INLINE vi bits(vf x) { return (vi)x; }
FASTKD_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
FASTKD_INLINE vf abs(vf x) { return bits(bits(x) & 0x7fffffff); }

// A NaN in x stays; in `floor` there is none.
FASTKD_INLINE vf at_least(vf x, vf floor) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)floor, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)floor, (__m256)x);
#else
    return x < floor ? floor : x;
#endif
}
FASTKD_INLINE vf at_most(vf x, vf ceiling) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)ceiling, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)ceiling, (__m256)x);
#else
    return x > ceiling ? ceiling : x;
#endif
}

FASTKD_INLINE vf round_to_even(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, 0x08);
#elif defined(__AVX2__)
    return (vf)_mm256_round_ps((__m256)x, 0x08);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: |x| < 2^22
    return (x + magic) - magic;
#endif
}

// 2^f - 1 for |f| <= 1/2: Chebyshev fit of (2^f - 1) / f, relative error of 2^f 1e-8 before rounding.
FASTKD_INLINE vf exp2m1_fraction(vf f) {
    vf p = splat(1.54531634e-4f);
    p = p * f + 1.33908633e-3f;
    p = p * f + 9.61808302e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    return p * f;
}

// m * 2^n for whole n <= 127; below -126 it is 0 (AVX-512 keeps denormals).
FASTKD_INLINE vf times_exp2(vf m, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)m, (__m512)n);
#else
    const vi exponent = __builtin_convertvector(at_least(n, splat(-127.0f)), vi) + 127;
    return m * bits(exponent << 23);
#endif
}

FASTKD_INLINE vf exp2(vf x) {
#if !defined(__AVX512F__)
    x = at_least(x, splat(-127.0f));
#endif
    const vf n = round_to_even(x);
    return times_exp2(exp2m1_fraction(x - n) + 1.0f, n);
}

// 2^x and 2^x - 1, the latter without cancellation, for x <= 0.
FASTKD_INLINE void exp2_and_m1(vf x, vf& e, vf& em1) {
#if !defined(__AVX512F__)
    x = at_least(x, splat(-127.0f));
#endif
    const vf n = round_to_even(x), fraction = exp2m1_fraction(x - n);
    const vf power = times_exp2(splat(1.0f), n);
    e = fraction * power + power;
    em1 = fraction * power + (power - 1.0f);
}

// log(y) for y = 1 + z > 0 (Cephes logf's polynomial): near 1 from z, elsewhere from y, so that neither is a difference.
FASTKD_INLINE vf log_natural(vf y, vf z) {
    const vi shifted = bits(y) - 0x3f3504f3;  // mantissa to [sqrt(1/2), sqrt(2))
    const vi exponent = shifted >> 23;
    const vf reduced = bits((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const vi near = (z > -0.29f) & (z < 0.41f);
    const vf f = select(near, z, reduced);
    const vf n = select(near, splat(0.0f), __builtin_convertvector(exponent, vf));
    vf p = splat(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const vf square = f * f;
    const vf result = f + (p * f * square - 0.5f * square) + n * kLn2;
    return select(z != z, z, result);
}

FASTKD_INLINE double sum(vf x) {
    double total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

FASTKD_INLINE vf widen_bfloat16(vh x) { return bits((vi)(__builtin_convertvector(x, vu) << 16)); }

FASTKD_INLINE vh narrow_bfloat16(vf x) {
    const vu b = (vu)x;
    const vu rounded = (b + (0x7fffu + ((b >> 16) & 1u))) >> 16;
    const vu quiet = (b >> 16) | 0x40u;
    return __builtin_convertvector((vu)((vi)(x != x) ? (vi)quiet : (vi)rounded), vh);
}

FASTKD_INLINE vf widen_float16(vh x) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps((__m128i)x);
#else
    const vu h = __builtin_convertvector(x, vu);
    const vu shifted = (h & 0x7fffu) << 13;
    const vf value = (vf)shifted * 5.192296858534828e33f;  // 2^112, exact for denormals too
    const vu finite = (vu)value;
    const vu special = finite | 0x7f800000u;
    const vu magnitude = (vu)((vi)(shifted >= (0x7c00u << 13)) ? (vi)special : (vi)finite);
    return (vf)(magnitude | ((h & 0x8000u) << 16));
#endif
}

FASTKD_INLINE vh narrow_float16(vf x) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtps_ph((__m512)x, 0x08);
#elif defined(__AVX2__)
    return (vh)_mm256_cvtps_ph((__m256)x, 0x08);
#else
    const vu sign = ((vu)x & 0x80000000u) >> 16;
    const vf magnitude = abs(x);
    const vu b = (vu)magnitude;
    // Below 2^-14 the addition of 1/2 lets the adder round to a multiple of 2^-24; above, round the mantissa to even.
    const vu denormal = (vu)(magnitude + 0.5f) - 0x3f000000u;
    const vu normal = (b - (112u << 23) + 0xfffu + ((b >> 13) & 1u)) >> 13;
    const vu nan = vu{} + 0x7e00u, infinite = vu{} + 0x7c00u;
    vi h = (vi)(magnitude < 6.103515625e-5f) ? (vi)denormal : (vi)normal;
    h = (vi)(magnitude >= 65520.0f) ? (vi)infinite : h;
    h = (vi)(x != x) ? (vi)nan : h;
    return __builtin_convertvector((vu)h | sign, vh);
#endif
}

}  // namespace
}  // namespace fastkd
