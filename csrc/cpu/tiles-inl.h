// A row of logits as tiles of floats that stay in the first-level cache. Included by one unit for each instruction set.
//
// A tile of float32 is read where it lies; other storage is widened into scratch first, so that the arithmetic exists once.
// Vectors sum within a tile, doubles over the tiles.
#pragma once
#include "logit.h"
#include "vec.h"

namespace fastkd {
namespace {

constexpr int64_t kTile = 128 * W;  // a lane's float sum is rounded so often, whatever the width
constexpr float kFloor = -1e30f;  // scaled logits end here, so that 0 * (x_t - x_s) stays 0

struct alignas(64) Tile {
    float data[kTile];
};

FASTKD_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

template <vf (*widen)(vh)>
FASTKD_INLINE void widen_into(const uint16_t* source, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vh x;
        __builtin_memcpy(&x, source + i, sizeof x);
        store(out + i, widen(x));
    }
    if (i < n) {
        vh x{};
        __builtin_memcpy(&x, source + i, (n - i) * sizeof(uint16_t));
        const vf wide = widen(x);
        for (int64_t j = 0; i + j < n; ++j) out[i + j] = wide[j];
    }
}

// n logits from `begin` on, as floats, padded to whole vectors with -inf (probability 0).
FASTKD_INLINE const float* fetch(const Row& row, int64_t begin, int64_t n, Tile& scratch) {
    if (row.dtype == Dtype::float32) {
        const float* source = static_cast<const float*>(row.data) + begin;
        if (n % W == 0) return source;
        __builtin_memcpy(scratch.data, source, n * sizeof(float));
    } else {
        const uint16_t* source = static_cast<const uint16_t*>(row.data) + begin;
        if (row.dtype == Dtype::bfloat16) {
            widen_into<widen_bfloat16>(source, n, scratch.data);
        } else {
            widen_into<widen_float16>(source, n, scratch.data);
        }
    }
    for (int64_t i = n; i < padded(n); ++i) scratch.data[i] = -kInfinity;
    return scratch.data;
}

// The same without one id: -inf is probability 0.
FASTKD_INLINE const float* fetch_but(int64_t id, const Row& row, int64_t begin, int64_t n, Tile& scratch) {
    const float* x = fetch(row, begin, n, scratch);
    if (id < begin || id >= begin + n) return x;
    if (x != scratch.data) __builtin_memcpy(scratch.data, x, n * sizeof(float));
    scratch.data[id - begin] = -kInfinity;
    return scratch.data;
}

// NaN may be lost here: it comes back through the sums.
FASTKD_INLINE void extremes(const float* x, int64_t n, float& highest, float& lowest) {
    vf high = splat(-kInfinity), low = splat(kInfinity);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vf v = load(x + i);
        high = at_least(v, high);
        low = at_most(v, low);
    }
    highest = -kInfinity, lowest = kInfinity;
    for (int j = 0; j < W; ++j) {
        highest = high[j] > highest ? high[j] : highest;
        lowest = low[j] < lowest ? low[j] : lowest;
    }
    for (; i < n; ++i) {
        highest = x[i] > highest ? x[i] : highest;
        lowest = x[i] < lowest ? x[i] : lowest;
    }
}

// The sum, taken from a logit near all the others: far from zero their digits would be lost.
FASTKD_INLINE double total(const float* x, int64_t n, float highest) {
    const float pivot = highest - highest == 0 ? highest : 0;
    vf sums = splat(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) sums += load(x + i) - pivot;
    double result = sum(sums);
    for (; i < n; ++i) result += x[i] - pivot;
    return result + (double)pivot * (double)n;
}

template <vh (*narrow)(vf)>
FASTKD_INLINE void narrow_into(uint16_t* out, const float* x, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vh half = narrow(load(x + i));
        __builtin_memcpy(out + i, &half, sizeof half);
    }
    if (i < n) {
        const vh half = narrow(load(x + i));
        __builtin_memcpy(out + i, &half, (n - i) * sizeof(uint16_t));
    }
}

[[maybe_unused]] static void write(void* grad, Dtype dtype, int64_t begin, const float* x, int64_t n) {
    if (dtype == Dtype::float32) {
        __builtin_memcpy(static_cast<float*>(grad) + begin, x, n * sizeof(float));
    } else if (dtype == Dtype::bfloat16) {
        narrow_into<narrow_bfloat16>(static_cast<uint16_t*>(grad) + begin, x, n);
    } else {
        narrow_into<narrow_float16>(static_cast<uint16_t*>(grad) + begin, x, n);
    }
}

}  // namespace
}  // namespace fastkd
