// Vectors of doubles, as long as those of floats, and what is written once for both.
#pragma once
#include "vec.h"

namespace fastkd {
namespace {

constexpr int64_t VD = W / 2;
typedef double vd __attribute__((vector_size(8 * VD)));
typedef int64_t vl __attribute__((vector_size(8 * VD)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<double> {
    typedef vd type;
};
template <>
struct VectorOf<float> {
    typedef vf type;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kWidth = sizeof(Vector<T>) / sizeof(T);

FASTKD_INLINE vd wide(double x) { return x - vd{}; }
FASTKD_INLINE vd load(const double* p) {
    vd x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
FASTKD_INLINE void store(double* p, vd x) { __builtin_memcpy(p, &x, sizeof x); }
// The first n, and zeros.
template <class T>
FASTKD_INLINE Vector<T> load(const T* p, int64_t n) {
    if (n >= kWidth<T>) return load(p);
    Vector<T> x{};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
template <class T>
FASTKD_INLINE void store(T* p, Vector<T> x, int64_t n) {
    if (n >= kWidth<T>) return store(p, x);
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}

}  // namespace
}  // namespace fastkd
