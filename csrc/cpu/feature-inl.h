// The pieces of the losses on features, on the tiles of the logit losses. Included by one unit for each instruction set.
#include <math.h>

#include "feature.h"
#include "tiles-inl.h"

namespace fastkd {
namespace {

typedef uint8_t vb __attribute__((vector_size(W)));

// n elements as floats, padded to whole vectors with 0.
FASTKD_INLINE const float* fetch_features(const Row& row, int64_t begin, int64_t n, Tile& scratch) {
    const float* x = fetch(row, begin, n, scratch);
    for (int64_t i = n; i < padded(n); ++i) scratch.data[i] = 0;
    return x;
}

// All 1 bits where the mask counts, n of them from `begin` on.
FASTKD_INLINE vi counted(const uint8_t* mask, int64_t n) {
    vb bytes{};
    __builtin_memcpy(&bytes, mask, n < W ? n : W);
    return __builtin_convertvector(bytes, vi) != 0;
}

FASTKD_INLINE void store_some(float* out, vf x, int64_t n) {
    if (n >= W) {
        store(out, x);
    } else {
        __builtin_memcpy(out, &x, n * sizeof(float));
    }
}

FASTKD_INLINE vf with_sign_of(vf x, vf magnitude) {
    return select(x > 0.0f, magnitude, select(x < 0.0f, -magnitude, x));  // 0 and NaN stay
}

template <Distance kind>
FASTKD_INLINE vf value_of(vf d, float delta) {
    if (kind == Distance::mse) return d * d;
    const vf a = abs(d);
    if (kind == Distance::l1) return a;
    return select(a > delta, delta * (a - 0.5f * delta), 0.5f * (d * d));
}

template <Distance kind>
FASTKD_INLINE vf slope_of(vf d, float delta) {
    if (kind == Distance::mse) return d + d;
    if (kind == Distance::l1) return with_sign_of(d, splat(1.0f));
    return select(abs(d) > delta, with_sign_of(d, splat(delta)), d);
}

template <Distance kind>
static double distance_of(float delta, const Row& student, const Row& teacher, const uint8_t* mask, int64_t n, float scale,
                          float* gradient) {
    Tile student_scratch, teacher_scratch;
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t size = n - begin < kTile ? n - begin : kTile;
        const float* s = fetch_features(student, begin, size, student_scratch);
        const float* t = fetch_features(teacher, begin, size, teacher_scratch);
        vf sums = splat(0.0f);
        for (int64_t i = 0; i < size; i += W) {
            vf d = load(s + i) - load(t + i);
            if (mask) d = select(counted(mask + begin + i, size - i), d, splat(0.0f));
            sums += value_of<kind>(d, delta);
            if (gradient) store_some(gradient + begin + i, scale * slope_of<kind>(d, delta), size - i);
        }
        total += sum(sums);
    }
    return total;
}

double distance(Distance kind, float delta, const Row& student, const Row& teacher, const uint8_t* mask, int64_t n,
                float scale, float* gradient) {
    switch (kind) {
        case Distance::mse: return distance_of<Distance::mse>(delta, student, teacher, mask, n, scale, gradient);
        case Distance::l1: return distance_of<Distance::l1>(delta, student, teacher, mask, n, scale, gradient);
        default: return distance_of<Distance::huber>(delta, student, teacher, mask, n, scale, gradient);
    }
}

double difference(const Row& s, float a, const Row& t, float b, int64_t n) {
    Tile s_scratch, t_scratch;
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t size = n - begin < kTile ? n - begin : kTile;
        const float* x = fetch_features(s, begin, size, s_scratch);
        const float* y = fetch_features(t, begin, size, t_scratch);
        vf sums = splat(0.0f);
        for (int64_t i = 0; i < size; i += W) {
            const vf d = load(x + i) / a - load(y + i) / b;
            sums += d * d;
        }
        total += sum(sums);
    }
    return total;
}

void combination(const Row& s, float a, const Row& t, float b, int64_t n, float weight, float factor, float* out) {
    Tile s_scratch, t_scratch;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t size = n - begin < kTile ? n - begin : kTile;
        const float* x = fetch_features(s, begin, size, s_scratch);
        const float* y = fetch_features(t, begin, size, t_scratch);
        for (int64_t i = 0; i < size; i += W) {
            store_some(out + begin + i, factor * (weight * (load(x + i) / a) - load(y + i) / b), size - i);
        }
    }
}

// |x|^p for the powers that are in use; of any other, vector by vector, by the C library.
FASTKD_INLINE vf power(vf x, float p) {
    if (p == 2) return x * x;
    if (p == 1) return abs(x);
    if (p == 4) return (x * x) * (x * x);
    vf result;
    for (int i = 0; i < W; ++i) result[i] = powf(__builtin_fabsf(x[i]), p);
    return result;
}

void add_powers(const Row& row, float p, int64_t n, float* sums) {
    Tile scratch;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t size = n - begin < kTile ? n - begin : kTile;
        const float* x = fetch_features(row, begin, size, scratch);
        int64_t i = 0;
        for (; i + W <= size; i += W) store(sums + begin + i, load(sums + begin + i) + power(load(x + i), p));
        if (i < size) {
            const vf rest = power(load(x + i), p);
            for (int64_t j = 0; i + j < size; ++j) sums[begin + i + j] += rest[j];
        }
    }
}

double sum_powers(const Row& row, float factor, float p, int64_t n) {
    Tile scratch;
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t size = n - begin < kTile ? n - begin : kTile;
        const float* x = fetch_features(row, begin, size, scratch);
        vf sums = splat(0.0f);
        for (int64_t i = 0; i < size; i += W) sums += power(factor * load(x + i), p);
        total += sum(sums);
    }
    return total;
}

void power_gradient(const Row& row, float p, int64_t n, const float* slope, bool one, float* out) {
    Tile scratch, slopes;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t size = n - begin < kTile ? n - begin : kTile;
        const float* x = fetch_features(row, begin, size, scratch);
        const float* each = one ? nullptr : fetch_features({slope, Dtype::float32}, begin, size, slopes);
        for (int64_t i = 0; i < size; i += W) {
            const vf v = load(x + i);
            const vf derivative = p == 2 ? v : with_sign_of(v, power(v, p - 1));
            store_some(out + begin + i, derivative * (one ? splat(*slope) : load(each + i)), size - i);
        }
    }
}

}  // namespace
}  // namespace fastkd
