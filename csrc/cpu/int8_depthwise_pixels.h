// Convolutions of each channel by itself, channels innermost.
#pragma once
#include "int8_multiply.h"

namespace fastkd {

// Quantised images with their padding: the strides of `grid` are between output pixels; further, from one tap to the next.
struct Int8Taps {
    int64_t kernel[2];
    int64_t line, tap;  // bytes
};

// How far behind the last pixel numbers are read. They count for nothing.
inline int64_t bytes_behind(const Int8Taps& taps) { return 4 * taps.tap + kPixelChannels; }

// Where words have four numbers, of one part (int8_pack.h).
void int8_depthwise_pixels(const Int8Grid&, const Int8Taps&, const Packing&, const char* packed, const Int8Epilogue&,
                           int threads);

}  // namespace fastkd
