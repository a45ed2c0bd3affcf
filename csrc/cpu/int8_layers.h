// int8 layers from float input to float output: fastkd/_int8.py, for the tensors of the CPU.
#pragma once
#include "int8_pack.h"

namespace fastkd {

struct Int8Layer {
    const void* input;
    Dtype dtype;         // of input, residual and output
    const float* given;  // the input's step; null: its own for each row or image
    const char* packed;
    const float *scale, *bias;  // no bias: null
    const void* residual;       // or null
    void* output;
    Activation activation;
    int threads;
};

struct Int8Matrix {
    int64_t rows, stride, residual_stride;  // strides in numbers
};

struct Int8Images {
    int64_t count, height, width;
    bool planes;  // contiguous; else channels_last
    int64_t kernel[2], stride[2], padding[2], dilation[2];

    int64_t output_size(int axis, int64_t size) const {
        return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
    }
};

void int8_linear(const Int8Layer&, const Int8Matrix&, const Packing&);
void int8_conv2d(const Int8Layer&, const Int8Images&, const Packing&);
void int8_weight_only(const Int8Layer&, const Int8Matrix&, const Packing&);

// Rows of weights, each with a scale, as they lie in the layer.
struct Int8Table {
    const int8_t* weight;
    const float* scale;
    int64_t rows, columns;
};

// The first id that is no row; `count`, if all are.
int64_t find_outside(const int64_t* ids, int64_t count, int64_t rows);
void int8_embedding(const Int8Table&, const int64_t* ids, int64_t count, void* output, Dtype dtype, int threads);

}  // namespace fastkd
