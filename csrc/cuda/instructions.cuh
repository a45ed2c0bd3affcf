// Instructions that CUDA C++ has no name for. All lanes of a warp take part in `multiply_add` and in `load_matrices`, which
// are volatile so that no compiler moves them to where some lanes are alone.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include <cuda_instructions.h>  // from whoever compiles this without CUDA
#else

namespace fastkd::cuda {

// c += a b: a has 16 rows of 32 int8 numbers, b 32 rows of 8, and c 16 rows of 8 int32. Lane l has of c the columns
// 2 (l % 4) and the next, of the rows l / 4 and l / 4 + 8.
__device__ inline void multiply_add(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes. Lane l says where row l % 8 of matrix l / 8 is in shared memory, and gets of every
// matrix the bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// 16 bytes to shared memory, or zeros: they are there when `wait_for_copies` has returned to the thread that asked for them,
// and after a barrier for all others.
__device__ inline void copy_sixteen(void* shared, const void* global, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(zeros ? 0 : 16)
                 : "memory");
}

// What was asked for since the last call is a group.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the `latest` groups are under way.
template <int latest>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(latest) : "memory");
}

__device__ inline float from_float16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ inline uint16_t to_float16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ inline uint16_t to_bfloat16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

}  // namespace fastkd::cuda
#endif
