// csrc/cuda/instructions.cuh for a compiler that knows no CUDA.
#pragma once
#include <cuda_runtime.h>

namespace fastkd_machine {

// Warps come together at a place; copies are those of the thread that runs.
void multiply_add(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const void* place);
void load_matrices(uint32_t (&words)[4], const void* row, const void* place);
void copy(void* shared, const void* global, unsigned bytes, unsigned given);
void close_copies();
void wait_for_copies(unsigned latest);
float from_float16(uint16_t bits);
uint16_t to_float16(float x);
uint16_t to_bfloat16(float x);

}  // namespace fastkd_machine

namespace fastkd::cuda {

using fastkd_machine::from_float16, fastkd_machine::to_bfloat16, fastkd_machine::to_float16, fastkd_machine::close_copies;

FASTKD_NOT_INLINED inline void multiply_add(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    fastkd_machine::multiply_add(c, a, {b0, b1}, __builtin_return_address(0));
}
FASTKD_NOT_INLINED inline void load_matrices(uint32_t (&words)[4], const void* row) {
    fastkd_machine::load_matrices(words, row, __builtin_return_address(0));
}
inline void copy_sixteen(void* shared, const void* global, bool zeros) { fastkd_machine::copy(shared, global, 16, zeros ? 0 : 16); }
template <int latest>
void wait_for_copies() {
    fastkd_machine::wait_for_copies(latest);
}

}  // namespace fastkd::cuda
