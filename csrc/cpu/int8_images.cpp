#include "int8_images.h"

#include "int8_image_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kLines = 8;                // that are quantised at a time: of planes, the longer the runs the better
constexpr int64_t kImages = 2 << 20;         // bytes of numbers at a time: what is read twice is still in a cache the second time
constexpr int64_t kFewImages = kImages / 8;  // where little is done with them: what they are made of is also read twice

Int8Channels channels_of(const Packing& p, const Int8Layout& layout) {
    if (p.joined > 1) return {1, p.shape.terms, p.shape.terms * layout.bytes()};
    if (!p.depthwise) return {p.shape.groups, p.shape.terms, p.run_words * 4};
    return {1, p.shape.channels, (p.shape.channels + layout.group - 1) / layout.group * 4};
}

// Of what is there of a padded line, what the image gives.
struct Range {
    int64_t first, last;
};

Range range(int64_t padding, int64_t size, int64_t every) {
    return {(padding + every - 1) / every, (padding + size + every - 1) / every};
}

int64_t every_one(const Int8Images& i, int axis) { return i.planes || i.kernel[axis] > 1 ? 1 : i.stride[axis]; }

int64_t padded(const Int8Images& i, int axis, int64_t size, int64_t every) {
    return (size + 2 * i.padding[axis] + every - 1) / every;
}

}  // namespace

QuantisedImages::QuantisedImages(const Int8Layer& l, const Int8Images& i, const Packing& p)
    : l_(l), i_(i), kernels_(active_instruction_set().int8), channels_(channels_of(p, kernels_.layout)),
      every{every_one(i, 0), every_one(i, 1)}, height(padded(i, 0, i.height, every[0])),
      width(padded(i, 1, i.width, every[1])),
      pixel_bytes(channels_.groups * channels_.bytes), line_bytes(width * pixel_bytes), image_bytes(height * line_bytes),
      room(std::max<int64_t>(1, std::min(i.count, (p.depthwise ? kFewImages : kImages) / std::max<int64_t>(1, image_bytes)))),
      taps{{i.kernel[0], i.kernel[1]}, i.dilation[0] * line_bytes, (i.kernel[1] > 1 ? i.dilation[1] : 1) * pixel_bytes},
      numbers(room * image_bytes + bytes_behind(taps)),
      steps(room), bands_((height + kLines - 1) / kLines), largest_(room * bands_) {}

void QuantisedImages::fill(int64_t first, int64_t count) {
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

// Some lines of the padded image.
uint32_t QuantisedImages::fill_band(int64_t image, int64_t band, float step, char* line, char* out) const {
    const int64_t begin = band * kLines, end = std::min(begin + kLines, height);
    const Range lines = range(i_.padding[0], i_.height, every[0]), pixels = range(i_.padding[1], i_.width, every[1]);
    const int64_t first = std::max(begin, lines.first), last = std::min(end, lines.last);
    const int64_t before = pixels.first * pixel_bytes, behind = line_bytes - pixels.last * pixel_bytes;
    const bool all = every[0] == 1 && every[1] == 1, given = l_.given;
    uint32_t most = given && !all ? largest_of_lines(image, begin * every[0], end * every[0]) : 0;
    const int zero = kernels_.layout.zero;
    if (first >= last || is_blank(step)) {
        std::memset(out + begin * line_bytes, zero, (end - begin) * line_bytes);
        return most;
    }
    std::memset(out + begin * line_bytes, zero, (first - begin) * line_bytes + before);
    for (int64_t y = first + 1; y < last; ++y) std::memset(out + y * line_bytes - behind, zero, behind + before);
    std::memset(out + last * line_bytes - behind, zero, (end - last) * line_bytes + behind);
    char* to = out + first * line_bytes + before;
    if (i_.planes) return fill_from_planes(image, first - i_.padding[0], last - first, step, to);
    for (int64_t y = first; y < last; ++y, to += line_bytes) {
        const char* x = line_of(image, y * every[0] - i_.padding[0]);
        if (every[1] == 1) {
            most = std::max(most, fill_from_pixels(x, i_.width, step, line, to));
            continue;
        }
        const int64_t size = channels_.count() * element_size(l_.dtype);
        for (int64_t i = pixels.first; i < pixels.last; ++i) {
            fill_from_pixels(x + (i * every[1] - i_.padding[1]) * size, 1, step, line, to + (i - pixels.first) * pixel_bytes);
        }
    }
    return most;
}

// Of lines of the padded image.
uint32_t QuantisedImages::largest_of_lines(int64_t image, int64_t first, int64_t last) const {
    const int64_t from = std::max<int64_t>(0, first - i_.padding[0]), to = std::min(i_.height, last - i_.padding[0]);
    if (from >= to) return 0;
    return kernels_.largest(line_of(image, from), l_.dtype, (to - from) * i_.width * channels_.count());
}

uint32_t QuantisedImages::fill_from_planes(int64_t image, int64_t y, int64_t lines, float step, char* out) const {
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
uint32_t QuantisedImages::quantize(const char* x, int64_t count, float step, char* out) const {
    if (l_.given) return kernels_.quantize(x, l_.dtype, count, step, out);
    kernels_.quantize_bounded(x, l_.dtype, count, step, out);
    return 0;
}

uint32_t QuantisedImages::fill_from_pixels(const char* x, int64_t pixels, float step, char* line, char* out) const {
    const int64_t count = pixels * channels_.count();
    const int64_t taken = channels_.terms * kernels_.layout.bytes(), given = channels_.bytes;
    if (taken == given) return quantize(x, count, step, out);
    const uint32_t most = quantize(x, count, step, line);
    // Whole words, which end with the next pixel's first numbers: their weights are 0.
    for (int64_t i = 0; i < pixels * channels_.groups; ++i) {
        if (given == 4) {
            std::memcpy(out + i * 4, line + i * taken, 4);  // of a known size, a single move
        } else {
            std::memcpy(out + i * given, line + i * taken, given);
        }
    }
    return most;
}

Int8Epilogue epilogue_of_images(const Int8Layer& l, const Int8Images& i, const Packing& p, int64_t first, const float* steps) {
    const int64_t pixels = i.output_size(0, i.height) * i.output_size(1, i.width), size = element_size(l.dtype);
    const int64_t stride = i.planes ? pixels : p.shape.channels, side_by_side = i.planes ? pixels : p.columns;
    const int64_t image_bytes = p.shape.channels * pixels * size;
    const char* residual = static_cast<const char*>(l.residual);
    return {l.scale, l.bias, steps, false, residual ? residual + first * image_bytes : nullptr,
            static_cast<char*>(l.output) + first * image_bytes, stride, stride, i.planes, l.dtype, l.activation,
            stores_of(l.output, i.count * image_bytes, side_by_side * size, l.threads)};
}

}  // namespace fastkd
