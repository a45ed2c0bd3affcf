// What is watched while the machine runs a kernel, and what was found.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastkd_machine::watch {

extern bool checking;      // a thread of a kernel runs, and not the machine itself
extern unsigned seed;      // of the order of threads and blocks; 0: as they are numbered
extern int64_t launches;   // so far
extern int64_t fails_at;   // the launch that fails, counted as launches are

void add_buffer(uintptr_t begin, size_t bytes, bool filled);  // that kernels may touch; filled: before they run
void forget();                                                // buffers, reports, launches
const std::vector<std::string>& reports();

void new_launch(const void* call, size_t call_size);
void new_block();
void next_epoch();
void set_thread(unsigned thread, const char* stack, size_t bytes);
// Of the running thread: to its memory, and of bytes that arrive later than they were asked for.
void access(uintptr_t begin, size_t bytes, bool write);
void begin_copy(uintptr_t shared, size_t bytes);
void end_copy(uintptr_t shared, size_t bytes);
void report(const char* what, const void* address, size_t bytes);

}  // namespace fastkd_machine::watch
