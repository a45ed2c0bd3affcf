// Losses on the squared distances of all pairs of rows (fastkd/_pairs.py says what they take and give), on a device.
//
// Every address is the device's. Nothing waits: the kernels are put on the stream, and what is returned is the error of the
// first launch that failed, or 0. Sums are in a fixed order, so that the same input gives the same bits.
#pragma once
#include <cstdint>

namespace fastkd::cuda {

// (n, n) each, symmetric with zeros on the diagonal; and their sums, one number each.
struct SquaredDistances {
    const double *student, *teacher;
    const double *student_sum, *teacher_sum;
    int64_t n;          // at least 1
    double coincident;  // closer rows, as a share of the root mean square of the distances, have distance 0
};

// Of the rows of x (n, d) and of y (m, d): squares (n, m) from their products (n, m) and from the squares of their lengths,
// (n) and (m). Where too few digits are left of |x_i|^2 + |y_j|^2 - 2 x_i . y_j, the differences of x_i and y_j are squared
// and added. If y is x (`own`), the upper triangle of `products` is read and the result is symmetric.
struct Rows {
    const double *data, *square_lengths;
    int64_t count;
};
int squared_distances(const double* products, const Rows& x, const Rows& y, int64_t d, bool own, double* squares, void* stream);

// weights (n, m) -> sum_j w_ij (x_i - y_j), (n, d): however large the weights of close rows are, their differences are exact.
int pull(const double* weights, const double* x, int64_t n, const double* y, int64_t m, int64_t d, double* out, void* stream);

// loss: the sum over the terms. slopes (n, n), or null if nobody wants them. `scratch` has as many bytes as asked for.
int64_t distance_loss_scratch(int64_t n);
int distance_loss(const SquaredDistances& squares, double delta, double* loss, double* slopes, void* scratch, void* stream);

// slab_bytes: about as much of `scratch` as one launch fills with partial sums, beside what is there for each pair.
int64_t angle_loss_scratch(int64_t n, bool gradient, int64_t slab_bytes);
int angle_loss(const SquaredDistances& squares, double delta, double* loss, double* slopes, int64_t slab_bytes, void* scratch,
               void* stream);

}  // namespace fastkd::cuda
