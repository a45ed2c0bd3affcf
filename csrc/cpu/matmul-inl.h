// The pieces of products of matrices. Included by one unit for each instruction set.
#pragma once
#include "matmul.h"
#include "product-inl.h"

namespace fastkd {
namespace {

template <class T>
constexpr int64_t kPanel = kVectors * kWidth<T>;

template <class T, class From>
FASTKD_INLINE void pack_from(const From* from, const Factor& factor, int64_t count, int64_t depth, T* out) {
    if (factor.across == 1 && count == kPanel<T>) {
        for (int64_t k = 0; k < depth; ++k, from += factor.along, out += kPanel<T>) {
            for (int64_t i = 0; i < kPanel<T>; ++i) out[i] = static_cast<T>(from[i]);
        }
        return;
    }
    for (int64_t i = 0; i < kPanel<T>; ++i) {
        if (i < count) {
            for (int64_t k = 0; k < depth; ++k) out[k * kPanel<T> + i] = static_cast<T>(from[i * factor.across + k * factor.along]);
        } else {
            for (int64_t k = 0; k < depth; ++k) out[k * kPanel<T> + i] = 0;
        }
    }
}

template <class T>
void pack_panel(const Factor& factor, int64_t first, int64_t count, int64_t begin, int64_t depth, T* out) {
    const int64_t at = first * factor.across + begin * factor.along;
    if (factor.doubles) {
        pack_from(static_cast<const double*>(factor.data) + at, factor, count, depth, out);
    } else {
        pack_from(static_cast<const float*>(factor.data) + at, factor, count, depth, out);
    }
}

template <class T>
void multiply_panels(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns, T* out, int64_t stride,
                     bool adds) {
    for (int64_t m = 0; m < rows; m += kRows) {
        T* c = out + m * stride;
        const int64_t count = rows - m < kRows ? rows - m : kRows;
        if (count == kRows && columns == kPanel<T>) {
            multiply<kPanel<T>, 1, kVectors>(left + m, right, kPanel<T>, depth, c, stride, adds);
            continue;
        }
        T tile[kRows * kPanel<T>];
        multiply<kPanel<T>, 1, kVectors>(left + m, right, kPanel<T>, depth, tile, kPanel<T>, false);
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t n = 0; n < columns; ++n) c[r * stride + n] = tile[r * kPanel<T> + n] + (adds ? c[r * stride + n] : 0);
        }
    }
}

}  // namespace
}  // namespace fastkd
