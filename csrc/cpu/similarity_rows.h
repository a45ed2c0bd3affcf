// Rows of cosines as probabilities, compared.
#pragma once
#include <cstdint>

namespace fastkd {

// Of contiguous cosines (rows, columns): the sum over all rows, and `slopes` (rows, columns) unless it is nullptr.
double compare_similarities(const double* student, const double* teacher, int64_t rows, int64_t columns, double eps, int threads,
                            double* slopes);

}  // namespace fastkd
