// What the kernels of pairs share.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastkd::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The mean squared distance, over the n (n - 1) pairs of different rows.
__device__ inline double mean_square(double sum, int64_t n) {
    return n > 1 ? sum / (static_cast<double>(n) * static_cast<double>(n - 1)) : 0.0;
}

// Rows whose squared distance is not above are coincident. NaN if there is no mean: then nothing is, and NaN spreads.
__device__ inline double coincident_square(double share, double mean) {
    constexpr double kLargest = 1.7976931348623157e308;
    return mean <= kLargest ? share * share * mean : 0.0 * mean;
}

// The sum of what the lanes of a warp have, in all of them and in one order.
__device__ inline double warp_sum(double x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
}

// The same over a block of whole warps; the result is thread 0's. `scratch` has a number for each warp.
__device__ inline double block_sum(double x, double* scratch) {
    x = warp_sum(x);
    __syncthreads();  // what was in `scratch` has been read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    if (threadIdx.x == 0) {
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
    }
    return sum;
}

}  // namespace fastkd::cuda
