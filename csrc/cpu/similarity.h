// Rows of cosines as probabilities: what every instruction set implements, once per table entry. The mathematics is in
// fastkd/_similarity.py.
#pragma once
#include <stdint.h>

namespace fastkd {

struct SimilarityKernels {
    // sum_j q_j log((q_j + eps) / (p_j + eps)) of n cosines each, and if `slopes` is there its derivative by the student's.
    double (*row)(const double* student, const double* teacher, int64_t n, double eps, double* slopes);
};

}  // namespace fastkd
