// The product of two matrices of any size.
#pragma once
#include <cstdint>

#include "matmul.h"

namespace fastkd {

// out (rows, columns) (+)= left right, contiguous, with sums of `depth` products in T. Of a matrix with its transpose half
// is computed, and the other half copied. The same bits whatever the number of threads.
template <class T>
void matmul(const Factor& left, const Factor& right, int64_t rows, int64_t depth, int64_t columns, bool adds, int threads, T* out);

}  // namespace fastkd
