// A machine that runs CUDA's threads one at a time, in an order that a test chooses, and watches what they touch.
//
// The kernels are compiled with -fsanitize=thread, which calls a function before each access to memory; machine.cpp has
// these functions. Reported are: an access outside of the buffers that a test names, a word that two threads of a launch
// touch with no barrier between and one of them writes, a word that is read before anyone wrote it, and a barrier or a
// shuffle that not all threads reach.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

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

// Every lane of a warp gives words, and gets those of all: [lane][word]. One of them is the first to go on.
using Words = uint32_t[8];
struct Gathered {
    const Words* words;
    unsigned warp;
    bool first;
};
Gathered gather(const uint32_t* words, int count, const void* place);

// Bytes that a thread asked for; until it has waited for them, those in shared memory are nobody's.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes, given;
};
std::vector<std::vector<Copy>>& copies_of_thread();  // groups that are under way, and last the one that is open

using Body = void (*)(void*);
int launch(Triple grid, Triple block, Body body, void* call, size_t call_size);

}  // namespace fastkd_machine
