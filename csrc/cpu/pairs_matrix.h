// Losses on all pairs of rows, as fastkd/_pairs.py describes them, and the matrices they are made of. Rows are contiguous,
// of floats or doubles.
#pragma once
#include <cstdint>

namespace fastkd {

// Squared distances (n, m) of the rows of x and y; of x with itself, symmetric to the bit, where y is nullptr.
template <class T>
void pair_squares(const T* x, int64_t n, const T* y, int64_t m, int64_t width, int threads, double* out);

// out_i = sum_j w_ij (x_i - y_j), (n, width). `w` is (n, m).
template <class T>
void pair_pull(const T* w, const T* x, int64_t n, const T* y, int64_t m, int64_t width, int threads, T* out);

// From squared distances (n, n): the sum of the terms, and `slopes` (n, n), the T of fastkd/_pairs.py.
double pair_distance_loss(const double* student, const double* teacher, int64_t n, double delta, int threads, double* slopes);
double pair_angle_loss(const double* student, const double* teacher, int64_t n, double delta, int threads, double* slopes);

}  // namespace fastkd
