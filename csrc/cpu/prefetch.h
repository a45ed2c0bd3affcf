// A line of the cache that will be written to, fetched as this core's own while there is something to compute. A store that
// misses is otherwise waited for by all that come after it, and the few that a processor can hold back are soon too many.
#pragma once
#include <stdint.h>

namespace fastkd {

constexpr int64_t kLine = 64;  // of a cache

namespace {

inline __attribute__((always_inline)) void expect_write(const void* at) {
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(at)));  // nothing, where a processor does not have it
#else
    __builtin_prefetch(at, 1);
#endif
}

}  // namespace
}  // namespace fastkd
