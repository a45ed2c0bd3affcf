// The products of an int8 layer over threads: quantised rows, whichever way they lie, times packed weights, to the output.
#pragma once
#include <vector>

#include "int8_layers.h"

namespace fastkd {

// The rows of a linear layer are one image of one line.
struct Int8Grid {
    const char* numbers;
    enum Kind { words, floats, depthwise } kind;
    int64_t images, height, width;                     // of the output
    int64_t image_stride, line_stride, pixel_stride;   // bytes from one output pixel's row to the next's
    int64_t group_stride;                              // bytes from one group's numbers to the next's
    std::vector<std::vector<Run>> runs;                // of each part of the packed weights
};

struct Int8Epilogue {
    const float *scale, *bias;
    const float* steps;
    bool step_by_pixel;    // else by image
    const void* residual;  // or null
    void* output;
    int64_t residual_stride, output_stride;  // numbers from pixel to pixel; in planes from channel to channel
    bool planes;
    Dtype dtype;
    Activation activation;
    Stores stores;

    // Some pixels of an image, side by side, and columns from `channel` on, as rows of pixels or, in planes, of columns. Their
    // sums are left to be said.
    Int8Lines lines(int64_t image, int64_t pixels_of_image, int64_t channels, int64_t begin, int64_t end, int64_t channel,
                    int64_t columns) const;
};

// Whether sums of so many columns may go to the output from registers, all at once; `l` is then as that takes it.
bool finishes_at_once(Int8Lines& l, int64_t pitch);

// Of an output of so many bytes, of which `row_bytes` are written side by side. One that is so large that its beginning has
// left the caches before somebody can read it is written around them: then it is not read from memory first and drives
// nothing else out, but lines of the cache must be whole. (As in memcpy of glibc: three quarters of the last cache. Of two
// layers in a row, 26 MB between them, this took a sixth off; of 6 MB it would add a tenth.)
//
// One that does not stay near is fetched, if sums go there from registers. With several threads it must be too large for all
// of them: what another has written last comes later than the weights that are asked for at the same time, and keeps them
// waiting.
Stores stores_of(const void* output, int64_t bytes, int64_t row_bytes, int threads);

// At the end of a thread's work, or another might not see what went past the caches.
inline void after_stores_past_caches() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

// The runs of each part, from those of a whole row.
std::vector<std::vector<Run>> parts_of(const std::vector<Run>& taps, const Packing&, int64_t word_bytes);

// Of the rows of a linear layer from `first` on.
Int8Epilogue epilogue_of_rows(const Int8Layer&, const Int8Matrix&, const Packing&, int64_t first, const float* steps,
                              bool step_by_pixel);

void int8_multiply(const Int8Grid&, const Packing&, const char* packed, const Int8Epilogue&, int threads);

}  // namespace fastkd
