// The product of two matrices of any size: what every instruction set implements, once per table entry.
//
// A matrix is packed in panels: some of its columns (or rows, of the left one) side by side, for one index of the sum
// after the other. Numbers are converted there, so that sums in doubles are taken of floats as they lie.
#pragma once
#include <stdint.h>

namespace fastkd {

// One side of a product, floats or doubles. Strides are in elements, and may be anything.
struct Factor {
    const void* data;
    bool doubles;
    int64_t across, along;  // from one row of the left matrix, or column of the right one, to the next; and along the sum
};

template <class T>
struct ProductKernels {
    int64_t panel;  // how many lie side by side
    // `count` of them from `first` on, zeros to fill up the panel, for `depth` indices of the sum from `begin` on.
    void (*pack)(const Factor&, int64_t first, int64_t count, int64_t begin, int64_t depth, T* out);
    // out (+)= left right', `rows` x `columns` of the two panels' product.
    void (*multiply)(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns, T* out, int64_t stride,
                     bool adds);
};

struct MatmulKernels {
    ProductKernels<double> wide;
    ProductKernels<float> narrow;
};

}  // namespace fastkd
