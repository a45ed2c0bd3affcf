// What the kernels of csrc/cuda need of CUDA's header, for a compiler that knows no CUDA. Found before the real one.
//
// A launch runs the threads of one block after another on one processor, each on a stack of its own, and switches where
// they wait for one another; see machine.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time. The section tells the machine's checks what is shared memory.
#define __shared__ static __attribute__((section("cuda_shared")))

using std::max;
using std::min;

struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
    unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorNoDevice = 100 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorNoDevice";
}
inline const char* cudaGetErrorString(cudaError_t) { return "as the test wants it"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }

// Not inlined: the address to return to says where threads wait.
#define FASTKD_NOT_INLINED __attribute__((noinline))

FASTKD_NOT_INLINED inline void __syncthreads() { fastkd_machine::barrier(__builtin_return_address(0)); }

namespace fastkd_machine {

template <class T>
T exchange(unsigned mask, T value, int from, const void* place) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = shuffle(mask, bits, from, place);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace fastkd_machine

template <class T>
FASTKD_NOT_INLINED T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return fastkd_machine::exchange(mask, value, fastkd_machine::lane() ^ lanes, __builtin_return_address(0));
}
template <class T>
FASTKD_NOT_INLINED T __shfl_sync(unsigned mask, T value, int from) {
    return fastkd_machine::exchange(mask, value, from, __builtin_return_address(0));
}
FASTKD_NOT_INLINED inline unsigned __ballot_sync(unsigned mask, bool yes) { return fastkd_machine::ballot(mask, yes, __builtin_return_address(0)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } call{kernel, {std::forward<Arguments>(arguments)...}};
    const auto body = [](void* data) {
        const Call& call = *static_cast<Call*>(data);
        std::apply(call.kernel, call.arguments);
    };
    const dim3 grid = config->gridDim, block = config->blockDim;
    return static_cast<cudaError_t>(fastkd_machine::launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, body, &call, sizeof call));
}
