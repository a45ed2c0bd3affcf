#include <vector>

#include "int8_depthwise_pixels.h"
#include "int8_depthwise_planes.h"
#include "int8_image_steps.h"
#include "int8_multiply.h"
#include "int8_steps.h"
#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kLines = 8;                // that are quantised at a time: of planes, the longer the runs the better
constexpr int64_t kImages = 2 << 20;         // bytes of numbers at a time: what is read twice is still in a cache the second time
constexpr int64_t kFewImages = kImages / 8;  // where little is done with them: what they are made of is also read twice

// How the channels of a pixel are laid out: groups of so many, each filled up to whole words unless the next pixel's follow.
struct Channels {
    int64_t groups, terms, bytes;
    int64_t count() const { return groups * terms; }
};

Channels channels_of(const Packing& p, const Int8Layout& layout) {
    if (p.joined > 1) return {1, p.shape.terms, p.shape.terms * layout.bytes()};
    if (!p.depthwise) return {p.shape.groups, p.shape.terms, p.run_words * 4};
    return {1, p.shape.channels, (p.shape.channels + layout.group - 1) / layout.group * 4};
}

// Images quantised with their padding around them, channels innermost: the taps of an output pixel are then at the same
// distances everywhere, and nothing is copied once for each tap.
class Quantised {
  public:
    Quantised(const Int8Layer& l, const Int8Images& i, const Packing& p)
        : l_(l), i_(i), kernels_(active_instruction_set().int8), channels_(channels_of(p, kernels_.layout)),
          height(i.height + 2 * i.padding[0]), width(i.width + 2 * i.padding[1]),
          pixel_bytes(channels_.groups * channels_.bytes), line_bytes(width * pixel_bytes),
          image_bytes(height * line_bytes),
          room(std::max<int64_t>(1, std::min(i.count, (p.depthwise ? kFewImages : kImages) / std::max<int64_t>(1, image_bytes)))),
          taps{{i.kernel[0], i.kernel[1]}, i.dilation[0] * line_bytes, (i.kernel[1] > 1 ? i.dilation[1] : 1) * pixel_bytes},
          numbers(room * image_bytes + bytes_behind(taps)),
          steps(room), bands_((height + kLines - 1) / kLines), largest_(room * bands_) {}

    void fill(int64_t first, int64_t count) {
        if (l_.given) {
            std::fill(steps.begin(), steps.end(), *l_.given);
        } else {
            find_image_steps(l_, channels_.count() * i_.height * i_.width, first, count, steps.data());
        }
        for_each_chunk(count * bands_, channels_.count() * i_.width * kLines, l_.threads, [&](int64_t begin, int64_t end) {
            std::vector<char> line(i_.width * channels_.count() * kernels_.layout.bytes() + 4);
            for (int64_t i = begin; i < end; ++i) {
                largest_[i] = fill_band(first + i / bands_, i % bands_, steps[i / bands_], line.data(),
                                        numbers.data() + i / bands_ * image_bytes);
            }
        });
        if (!l_.given) return;
        for (int64_t i = 0; i < count; ++i) steps[i] = step_of(largest_of(largest_.data() + i * bands_, bands_), l_.given);
    }

  private:
    const Int8Layer& l_;
    const Int8Images& i_;
    const Int8Kernels& kernels_;
    const Channels channels_;

  public:
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

    // Some lines of the padded image.
    uint32_t fill_band(int64_t image, int64_t band, float step, char* line, char* out) const {
        const int64_t begin = band * kLines, end = std::min(begin + kLines, height);
        const int64_t first = std::max(begin, i_.padding[0]), last = std::min(end, i_.padding[0] + i_.height);
        const int64_t margin = i_.padding[1] * pixel_bytes;
        const int zero = kernels_.layout.zero;
        if (first >= last || is_blank(step)) {
            std::memset(out + begin * line_bytes, zero, (end - begin) * line_bytes);
            return 0;
        }
        std::memset(out + begin * line_bytes, zero, (first - begin) * line_bytes + margin);
        for (int64_t y = first + 1; y < last; ++y) std::memset(out + y * line_bytes - margin, zero, 2 * margin);
        std::memset(out + last * line_bytes - margin, zero, (end - last) * line_bytes + margin);
        char* pixels = out + first * line_bytes + margin;
        if (i_.planes) return fill_from_planes(image, first - i_.padding[0], last - first, step, pixels);
        uint32_t most = 0;
        for (int64_t y = first; y < last; ++y, pixels += line_bytes) {
            if (is_read(y)) {
                most = std::max(most, fill_from_pixels(image, y - i_.padding[0], step, line, pixels));
            } else if (l_.given) {
                most = std::max(most, kernels_.largest(pixels_of(image, y - i_.padding[0]), l_.dtype, i_.width * channels_.count()));
            }
        }
        return most;
    }

    // Whether a line of the padded image belongs to an output: with steps larger than the kernel some do not.
    bool is_read(int64_t y) const {
        for (int64_t tap = 0; tap < i_.kernel[0]; ++tap) {
            const int64_t first = y - tap * i_.dilation[0];
            if (first >= 0 && first % i_.stride[0] == 0 && first / i_.stride[0] < i_.output_size(0, i_.height)) return true;
        }
        return false;
    }

    const char* pixels_of(int64_t image, int64_t y) const {
        return input((image * i_.height + y) * i_.width * channels_.count());
    }

    uint32_t fill_from_planes(int64_t image, int64_t y, int64_t lines, float step, char* out) const {
        const int64_t plane = i_.height * i_.width;
        uint32_t most = 0;
        for (int64_t group = 0; group < channels_.groups; ++group) {
            const char* x = input((image * channels_.count() + group * channels_.terms) * plane + y * i_.width);
            char* words = out + group * channels_.bytes;
            const uint32_t found = kernels_.quantize_planes({x, l_.dtype, plane, channels_.terms, i_.width, lines, step,
                                                             words, pixel_bytes, line_bytes, !l_.given});
            most = std::max(most, found);
        }
        return most;
    }

    // The largest magnitude only where the step was known before it.
    uint32_t quantize(const char* x, int64_t count, float step, char* out) const {
        if (l_.given) return kernels_.quantize(x, l_.dtype, count, step, out);
        kernels_.quantize_bounded(x, l_.dtype, count, step, out);
        return 0;
    }

    uint32_t fill_from_pixels(int64_t image, int64_t y, float step, char* line, char* out) const {
        const int64_t count = i_.width * channels_.count();
        const char* x = pixels_of(image, y);
        const int64_t taken = channels_.terms * kernels_.layout.bytes(), given = channels_.bytes;
        if (taken == given) return quantize(x, count, step, out);
        const uint32_t most = quantize(x, count, step, line);
        // Whole words, which end with the next pixel's first numbers: their weights are 0.
        for (int64_t i = 0; i < i_.width * channels_.groups; ++i) {
            if (given == 4) {
                std::memcpy(out + i * 4, line + i * taken, 4);  // of a known size, a single move
            } else {
                std::memcpy(out + i * given, line + i * taken, given);
            }
        }
        return most;
    }
};

std::vector<Run> runs_of(const Int8Taps& taps, const Packing& p) {
    std::vector<Run> runs;
    for (int64_t y = 0; y < taps.kernel[0]; ++y) {
        for (int64_t x = 0; x < taps.kernel[1]; x += p.joined) runs.push_back({y * taps.line + x * taps.tap, p.run_words});
    }
    return runs;
}

}  // namespace

void int8_conv2d(const Int8Layer& l, const Int8Images& i, const Packing& p) {
    const int64_t height = i.output_size(0, i.height), width = i.output_size(1, i.width);
    const int64_t pixels = height * width, size = p.shape.channels * pixels * element_size(l.dtype);
    if (i.count * size == 0) return;
    prefer_huge_pages(l.output, i.count * size);
    if (p.depthwise && i.planes && p.parts == 1) return int8_depthwise_planes(l, i, p);
    Quantised q(l, i, p);
    Int8Grid grid{q.numbers.data(),       p.depthwise ? Int8Grid::depthwise : Int8Grid::words, 0, height, width,
                  q.image_bytes,          i.stride[0] * q.line_bytes,
                  i.stride[1] * q.pixel_bytes, p.run_words * 4, parts_of(runs_of(q.taps, p), p, 4)};
    const char* residual = static_cast<const char*>(l.residual);
    for (int64_t first = 0; first < i.count; first += q.room) {
        grid.images = std::min(q.room, i.count - first);
        q.fill(first, grid.images);
        const int64_t stride = i.planes ? pixels : p.shape.channels, side_by_side = i.planes ? pixels : p.columns;
        const Int8Epilogue epilogue{l.scale, l.bias, q.steps.data(), false, residual ? residual + first * size : nullptr,
                                    static_cast<char*>(l.output) + first * size, stride, stride, i.planes, l.dtype,
                                    l.activation,
                                    goes_past_caches(l.output, i.count * size, side_by_side * element_size(l.dtype))};
        if (p.depthwise && p.four && p.parts == 1) {
            int8_depthwise_pixels(grid, q.taps, p, l.packed, epilogue, l.threads);
        } else {
            int8_multiply(grid, p, l.packed, epilogue, l.threads);
        }
    }
}

}  // namespace fastkd
