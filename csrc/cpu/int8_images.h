// Images quantised with their padding around them, channels innermost: the taps of an output pixel are then at the same
// distances everywhere, and nothing is copied once for each tap. Where there is one tap, what the strides leave out is not
// there at all.
#pragma once
#include <vector>

#include "int8_depthwise_pixels.h"
#include "int8_steps.h"

namespace fastkd {

// How the channels of a pixel are laid out: groups of so many, each filled up to whole words unless the next pixel's follow.
struct Int8Channels {
    int64_t groups, terms, bytes;
    int64_t count() const { return groups * terms; }
};

class QuantisedImages {
  public:
    QuantisedImages(const Int8Layer&, const Int8Images&, const Packing&);

    // `room` images at most, from the first on.
    void fill(int64_t first, int64_t count);

  private:
    const Int8Layer& l_;
    const Int8Images& i_;
    const Int8Kernels& kernels_;
    const Int8Channels channels_;

  public:
    const int64_t every[2];  // of the lines and of the pixels of a line that are there
    const int64_t height, width;
    const int64_t pixel_bytes, line_bytes, image_bytes;
    const int64_t room;  // images at a time
    const Int8Taps taps;
    const Scratch numbers;
    std::vector<float> steps;

  private:
    const int64_t bands_;            // of an image
    std::vector<uint32_t> largest_;  // of each band

    const char* input(int64_t number) const { return static_cast<const char*>(l_.input) + number * element_size(l_.dtype); }
    const char* line_of(int64_t image, int64_t y) const {
        return input((image * i_.height + y) * i_.width * channels_.count());
    }
    uint32_t fill_band(int64_t image, int64_t band, float step, char* line, char* out) const;
    uint32_t fill_from_planes(int64_t image, int64_t y, int64_t lines, float step, char* out) const;
    uint32_t fill_from_pixels(const char* x, int64_t pixels, float step, char* line, char* out) const;
    uint32_t largest_of_lines(int64_t image, int64_t first, int64_t last) const;
    uint32_t quantize(const char* x, int64_t count, float step, char* out) const;
};

// Of some images from the first on.
Int8Epilogue epilogue_of_images(const Int8Layer&, const Int8Images&, const Packing&, int64_t first, const float* steps);

}  // namespace fastkd
