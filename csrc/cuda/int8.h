// An int8 linear layer on a device: fastkd/_int8.py says what it computes.
//
// Every address is the device's. Nothing waits: the kernels are put on the stream, and what is returned is the error of the
// first launch that failed, or 0. Sums are integers, and exact.
#pragma once
#include <cstdint>

#include "../cpu/int8.h"

namespace fastkd::cuda {

struct Int8Linear {
    const void* input;  // rows of `terms` numbers, `stride` apart
    int64_t rows, terms, columns, stride;
    Dtype dtype;         // of the input, the residual and the output
    const float* given;  // what one step of the input stands for, or null: each row has its own
    const int8_t* weight;
    const float *scale, *bias;
    const void* residual;
    int64_t residual_stride;
    void* output;
    Activation activation;
};

// `scratch` has as many bytes as asked for. There is at least one row and one column. processors: multiprocessors of the
// device; the work is split so that all have some.
int64_t int8_linear_scratch(int64_t rows, int64_t terms, int64_t columns, int64_t processors);
int int8_linear(const Int8Linear& layer, int64_t processors, void* scratch, void* stream);

}  // namespace fastkd::cuda
