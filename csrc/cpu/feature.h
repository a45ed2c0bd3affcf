// The pieces of the losses on features that are bound by memory: what every instruction set implements, once per table
// entry. The mathematics is in fastkd/reference/hint.py and attention_maps.py. A gradient is float32, whatever the features
// are stored in, because it is scaled before it is rounded.
#pragma once
#include "logit.h"

namespace fastkd {

enum class Distance : int32_t { mse, l1, huber, cosine };

struct FeatureKernels {
    // The sum over n elements, of any distance but cosine; and if `gradient` is there, its derivative times `scale`. Where
    // the mask, a byte an element, is 0, both are 0, whatever is there. No mask: all count.
    double (*distance)(Distance, float delta, const Row& student, const Row& teacher, const uint8_t* mask, int64_t n,
                       float scale, float* gradient);
    // sum (s / a - t / b)^2. Division, because a reciprocal's rounding would leave something of rows that are alike.
    double (*difference)(const Row& s, float a, const Row& t, float b, int64_t n);
    // out = factor (weight s / a - t / b)
    void (*combination)(const Row& s, float a, const Row& t, float b, int64_t n, float weight, float factor, float* out);
    // sums[i] += |x_i|^p
    void (*add_powers)(const Row&, float p, int64_t n, float* sums);
    // sum |factor x_i|^p
    double (*sum_powers)(const Row&, float factor, float p, int64_t n);
    // out_i = slope_i d(|x_i|^p / p) / dx_i, with one slope for all or one each.
    void (*power_gradient)(const Row&, float p, int64_t n, const float* slope, bool one, float* out);
};

}  // namespace fastkd
