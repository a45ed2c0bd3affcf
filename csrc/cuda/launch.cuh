// How kernels are launched: without <<<>>>, so that a compiler that knows no CUDA takes these files too (tests/cuda_on_cpu).
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace fastkd::cuda {

// Several launches on one stream, and the first error among them: after it, the others are left out.
class Launcher {
  public:
    explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

    template <class... Parameters, class... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) {
        if (error_ != cudaSuccess) return;
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.blockDim = block;
        config.stream = stream_;
        error_ = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    }

    int error() const { return static_cast<int>(error_); }

  private:
    cudaStream_t stream_;
    cudaError_t error_ = cudaSuccess;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a loop over `count` items that strides by the grid: no more than fill a device a few times.
inline unsigned blocks_for(int64_t count, int threads) {
    constexpr int64_t kMost = 4096;
    return static_cast<unsigned>(std::min(divide_up(count, threads), kMost));
}

}  // namespace fastkd::cuda
