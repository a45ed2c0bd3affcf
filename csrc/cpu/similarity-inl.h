// Rows of cosines as probabilities. Included by one unit for each instruction set.
#pragma once
#include "pairs-inl.h"
#include "similarity.h"

namespace fastkd {
namespace {

// log(x) of positive doubles: of the mantissa m, in [sqrt(1/2), sqrt(2)), it is 2 atanh(s) with s = (m - 1) / (m + 1), whose
// series has |s| < 0.172. Near 1 nothing cancels.
FASTKD_INLINE vd log_natural(vd x) {
    constexpr int64_t least = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
    const vl shifted = (vl)x - least;
    const vd f = (vd)((shifted & 0x000fffffffffffff) + least) - 1.0;
    const vd s = f / (f + 2.0), z = s * s;
    vd series = wide(1.0 / 19);
#pragma GCC unroll 9
    for (int odd = 17; odd > 0; odd -= 2) series = series * z + 1.0 / odd;
    const vd result = 2.0 * s * series + __builtin_convertvector(shifted >> 52, vd) * 0.693147180559945309417;
    return (vl)(x != x) ? x : result;
}

FASTKD_INLINE vd similarity(const double* cosines, int64_t j, int64_t n) {
    const vd x = 1.0 + clamped(load(cosines + j, n - j), wide(1.0));
    if (n - j >= VD) return x;
    vd there{};
    for (int64_t i = 0; i < n - j; ++i) there[i] = x[i];
    return there;
}

FASTKD_INLINE double similarities(const double* cosines, int64_t n) {
    vd total{};
    for (int64_t j = 0; j < n; j += VD) total += similarity(cosines, j, n);
    return sum(total);
}

double similarity_row(const double* student, const double* teacher, int64_t n, double eps, double* slopes) {
    const double mine = similarities(student, n), taught = similarities(teacher, n);
    vd total{}, along{};
    for (int64_t j = 0; j < n; j += VD) {
        const vd p = similarity(student, j, n) / mine, q = similarity(teacher, j, n) / taught;
        const vd ratio = q / (p + eps);
        total += q * log_natural((q + eps) / (p + eps));
        if (slopes == nullptr) continue;
        along += ratio * p;
        store(slopes + j, ratio, n - j);
    }
    if (slopes == nullptr) return sum(total);
    const double share = sum(along);
    for (int64_t j = 0; j < n; j += VD) store(slopes + j, (share - load(slopes + j, n - j)) / mine, n - j);
    return sum(total);
}

}  // namespace
}  // namespace fastkd
