// The pieces of losses on all pairs of rows: what every instruction set implements, once per table entry. What they make
// together is in fastkd/_pairs.py. Rows are floats or doubles, and squared distances doubles.
#pragma once
#include <stdint.h>

namespace fastkd {

constexpr int64_t kGroup = 8;        // anchors that lie side by side, whatever the width of a vector; also rows of a tile
constexpr int64_t kMaxColumns = 32;  // no instruction set pulls on more columns at once

// Rows as they lie; the stride is in elements.
template <class T>
struct Rows {
    const T* data;
    int64_t count, stride;
};

// What the angles read of a row j and an anchor i, and what they add up there: kGroup anchors side by side, in the order
// of these names. The distances are squared. `scale` is 1 / (sqrt(2) d_ij), so that a product of two is half of one of
// inverses; 0 for coincident rows, and for those that fill up a group.
enum { kStudentSquare, kStudentScale, kTeacherSquare, kTeacherScale, kAngleInputs };
enum { kSlopes, kBentSlopes, kAngleSums };

struct AngleProblem {
    const double* inputs;  // [row][group][kAngleInputs][kGroup]
    double* sums;          // [row][group][kAngleSums][kGroup]
    double* opposite;      // [row][row]: what the distance between two rows gets from all anchors
    int64_t rows;          // a multiple of kGroup
    double delta;
};

struct DistanceRow {
    const double *student, *teacher;  // squared
    int64_t n;
    double student_least, teacher_least;  // of what is no coincidence, squared
    double student_mean, teacher_mean;  // of the distances; infinity where it is 0
    double delta;
};

struct DistanceSums {
    double loss, slope;  // slope: sum_j h_j psi_j
};

template <class T>
struct RowKernels {
    // Squared distances of all rows of x and of y; with `mirrored` their transpose as well.
    void (*squares)(const Rows<T>& x, const Rows<T>& y, int64_t width, double* out, double* mirrored, int64_t stride);
    // out_i = sum_j w_ij (x_i - y_j) in `count` columns from `first` on, at most `columns` of them.
    void (*pull)(const T* w, int64_t w_stride, const Rows<T>& x, const Rows<T>& y, int64_t first, int64_t count, T* packed,
                 T* out, int64_t out_stride);
    int64_t columns;
};

struct PairKernels {
    RowKernels<double> wide;
    RowKernels<float> narrow;
    // The sum of those of n distances whose square is greater than `least`.
    double (*distances)(const double* squares, int64_t n, double least);
    // h_j = clamp(psi_j - teacher's, -delta, delta), of the distances from one row.
    DistanceSums (*distance_row)(const DistanceRow&, double* h);
    // (h_j - shift) / (mean d_j) instead of h_j, 0 where rows are coincident.
    void (*distance_slopes)(const DistanceRow&, double shift, double* h);
    // All anchors' angles between kGroup rows from j on and kGroup rows from k on, each pair once; of a tile with itself in
    // both orders. Returns the sum of their terms.
    double (*angles)(const AngleProblem&, int64_t j, int64_t k);
};

}  // namespace fastkd
