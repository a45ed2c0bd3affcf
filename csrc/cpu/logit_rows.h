// All rows of a logit loss: forward and backward, as fastkd/_rows.py describes them.
#pragma once
#include <vector>

#include "logit.h"

namespace fastkd {

// Rows of logits; the stride is in elements.
struct Matrix {
    const void* data;
    int64_t stride;
    Dtype dtype;

    Row row(int64_t i) const {
        const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
        return {static_cast<const char*>(data) + i * stride * bytes, dtype};
    }
};

// A number that may vary by row: `data` with a stride, or else `value`.
struct ByRow {
    const float* data = nullptr;
    int64_t stride = 0;
    double value = 0;

    double operator[](int64_t i) const { return data ? data[i * stride] : value; }
};

struct LogitProblem {
    Matrix student;
    std::vector<Matrix> teachers;
    int64_t rows, vocabulary, shared;
    const int64_t* target;  // or nullptr; stride 1
    int64_t ignore_index;
    ByRow row_weight, alpha, temperature;
    std::vector<ByRow> teacher_temperature, teacher_weight;
    Divergence divergence;
    double beta;
    bool scale_by_t2;
    double label_smoothing, z_loss;
    bool agreement;
    int threads;
    bool without_target, standardize;
    ByRow label_slope;
};

// What only the data shows: the first row with an id outside the vocabulary, or a temperature not positive and finite.
struct Fault {
    enum Kind { none, target, temperature, teacher_temperature } kind = none;
    double got = 0;
};
Fault find_fault(const LogitProblem&);

// What becomes of the rows: nothing, their sum over a number, or over the sum of their weights.
enum class Reduction : int32_t { none, sum, mean };

// `loss` has one element, or one a row. Returns 1 / divisor, or 0 for a divisor of 0.
double logit_forward(const LogitProblem&, Reduction, double divisor, float* loss, double* state);

// `grad_loss` has a stride, 0 for a loss that was reduced. `fresh`: the gradient's memory was just allocated, and is not
// the student's.
void logit_backward(const LogitProblem&, const double* state, const float* grad_loss, int64_t grad_loss_stride, double scale,
                    void* grad, int64_t grad_stride, bool fresh);

}  // namespace fastkd
