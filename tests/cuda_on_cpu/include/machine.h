// A machine that runs CUDA's threads one at a time, in an order that a test chooses, and watches what they touch.
//
// The kernels are compiled with -fsanitize=thread, which calls a function before each access to memory; machine.cpp has
// these functions. Reported are: an access outside of the buffers that a test names, a word that two threads of a launch
// touch with no barrier between and one of them writes, a word that is read before anyone wrote it, and a barrier or a
// shuffle that not all threads reach.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastkd_machine {

struct Triple {
    unsigned x, y, z;
};

}  // namespace fastkd_machine

// Of the thread that runs; set whenever it goes on.
extern fastkd_machine::Triple threadIdx, blockIdx, blockDim, gridDim;

namespace fastkd_machine {

int lane();
void barrier(const void* place);
uint64_t shuffle(unsigned mask, uint64_t bits, int from, const void* place);
unsigned ballot(unsigned mask, bool yes, const void* place);

using Body = void (*)(void*);
int launch(Triple grid, Triple block, Body body, void* call, size_t call_size);

}  // namespace fastkd_machine
