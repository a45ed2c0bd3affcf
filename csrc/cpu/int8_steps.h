// Steps of quantised rows and images, and the bytes of their numbers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "int8.h"
#include "prefetch.h"
#include "scratch.h"

namespace fastkd {

constexpr int64_t kScratch = 8 << 20;  // bytes that the numbers of a call may take at a time; one row or image always fits
constexpr uint32_t kInfinite = 0x7f800000;

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// From the bits of the largest magnitude. NaN, where that is infinite or a NaN.
inline float step_of(uint32_t largest, const float* given) {
    if (largest >= kInfinite) return std::numeric_limits<float>::quiet_NaN();
    if (given) return *given;
    float amax;
    std::memcpy(&amax, &largest, sizeof amax);
    return amax / kLevels;
}

// Bytes from row to row: an odd number of cache lines, for with a power of two all rows of a tile would compete for the
// same few places.
inline int64_t odd_lines(int64_t bytes) { return ((bytes + kLine - 1) / kLine | 1) * kLine; }

// A row whose step is 0, and one that is NaN whatever its numbers are.
inline bool is_blank(float step) { return !(step > 0); }

}  // namespace fastkd
