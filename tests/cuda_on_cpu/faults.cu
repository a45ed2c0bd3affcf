// Three kernels that can be made wrong, each in several ways: the machine has to see it.
#include "faults.h"

#include <cuda_instructions.h>

namespace faults {
namespace {

constexpr int kThreads = 64;

struct Problem {
    int fault;
    const float* in;  // kThreads a block
    float* out;       // the same
};

// Reverses the numbers of a block by way of shared memory.
__global__ void reverse(Problem p) {
    __shared__ float shared[kThreads + 1];
    const int t = threadIdx.x, base = blockIdx.x * kThreads;
    if (p.fault != kUnwritten || t != 5) shared[t] = p.in[base + t];
    if (p.fault != kNoBarrier && !(p.fault == kSomeBarrier && t == 7)) __syncthreads();
    const float x = shared[kThreads - 1 - t];
    p.out[base + t] = x;
    if (p.fault == kWriteAfterRead) shared[t] = x;
    if (p.fault == kWriteBeyond && blockIdx.x == gridDim.x - 1 && t == kThreads - 1) p.out[base + kThreads] = x;
    if (p.fault == kReadBeyond && blockIdx.x == 0 && t == 0) p.out[0] = x + 0 * p.in[-1];
    if (p.fault == kTwoWriters && t == 0) p.out[0] = 1;
    if (p.fault == kReadOfOther && t == 1) p.out[base + t] = x + 0 * p.out[base];
    if (p.fault == kBlocks && t == 1 && blockIdx.x == 1) p.out[base + t] = x + 0 * p.out[0];
}

// Sums of whole warps.
__global__ void sum(Problem p) {
    const int t = threadIdx.x, base = blockIdx.x * kThreads;
    float x = p.in[base + t];
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        if (p.fault == kSomeLanes && t == 3 && lanes == 4) continue;
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    if (p.fault == kMisaligned && t == 0) {
        const float4 four = *reinterpret_cast<const float4*>(p.in + 1);
        x += 0 * (four.x + four.y + four.z + four.w);
    }
    const unsigned votes = __ballot_sync(0xffffffffu, t % 3 == 0);
    p.out[base + t] = x + static_cast<float>(votes % 2);
}

struct alignas(16) Aligned {
    float at[kThreads + 4];
};

// As `reverse`, with copies that arrive later than they are asked for.
__global__ void reverse_copied(Problem p) {
    using namespace fastkd::cuda;
    __shared__ Aligned shared;
    const int t = threadIdx.x, base = blockIdx.x * kThreads;
    const bool last = blockIdx.x == gridDim.x - 1 && t == kThreads / 4 - 1;
    const int off = p.fault == kMisalignedCopy && t == 0 ? 1 : p.fault == kCopyBeyond && last ? 4 : 0;
    if (t < kThreads / 4) copy_sixteen(shared.at + 4 * t, p.in + base + 4 * t + off, false);
    close_copies();
    if (p.fault == kCopyOverCopy && t == kThreads / 4 - 1) shared.at[kThreads - 1] = 1;
    if (p.fault == kNoWait && t == 7) {
        wait_for_copies<1>();
    } else {
        wait_for_copies<0>();
    }
    if (p.fault != kNoBarrierAfterWait) __syncthreads();
    const float x = shared.at[kThreads - 1 - t];
    p.out[base + t] = x;
    if ((p.fault == kCopyOverRead || p.fault == kEndBeforeCopy) && t == 5) {
        copy_sixteen(shared.at + (p.fault == kCopyOverRead ? 0 : kThreads), p.in + base, false);
        close_copies();
        if (p.fault == kCopyOverRead) wait_for_copies<0>();
    }
}

}  // namespace

int run(int fault, uintptr_t in, uintptr_t out, unsigned blocks, unsigned threads) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = threads;
    const Problem p = {fault, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out)};
    return cudaLaunchKernelEx(&config, fault >= kCopy ? reverse_copied : fault >= kSum ? sum : reverse, p);
}

}  // namespace faults
