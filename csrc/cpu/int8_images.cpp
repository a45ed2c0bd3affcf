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

}  // namespace

QuantisedImages::QuantisedImages(const Int8Layer& l, const Int8Images& i, const Packing& p, const Int8Behind& behind)
    : l_(l), i_(i), kernels_(active_instruction_set().int8), channels_(channels_of(p, kernels_.layout)),
      height(i.height + 2 * i.padding[0] + behind.lines), width(i.width + 2 * i.padding[1] + behind.pixels),
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
    const int64_t first = std::max(begin, i_.padding[0]), last = std::min(end, i_.padding[0] + i_.height);
    const int64_t before = i_.padding[1] * pixel_bytes, behind = line_bytes - before - i_.width * pixel_bytes;
    const int zero = kernels_.layout.zero;
    if (first >= last || is_blank(step)) {
        std::memset(out + begin * line_bytes, zero, (end - begin) * line_bytes);
        return 0;
    }
    std::memset(out + begin * line_bytes, zero, (first - begin) * line_bytes + before);
    for (int64_t y = first + 1; y < last; ++y) std::memset(out + y * line_bytes - behind, zero, behind + before);
    std::memset(out + last * line_bytes - behind, zero, (end - last) * line_bytes + behind);
    char* pixels = out + first * line_bytes + before;
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
bool QuantisedImages::is_read(int64_t y) const {
    for (int64_t tap = 0; tap < i_.kernel[0]; ++tap) {
        const int64_t first = y - tap * i_.dilation[0];
        if (first >= 0 && first % i_.stride[0] == 0 && first / i_.stride[0] < i_.output_size(0, i_.height)) return true;
    }
    return false;
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

uint32_t QuantisedImages::fill_from_pixels(int64_t image, int64_t y, float step, char* line, char* out) const {
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

Int8Epilogue epilogue_of_images(const Int8Layer& l, const Int8Images& i, const Packing& p, int64_t first, const float* steps) {
    const int64_t pixels = i.output_size(0, i.height) * i.output_size(1, i.width), size = element_size(l.dtype);
    const int64_t stride = i.planes ? pixels : p.shape.channels, side_by_side = i.planes ? pixels : p.columns;
    const int64_t image_bytes = p.shape.channels * pixels * size;
    const char* residual = static_cast<const char*>(l.residual);
    return {l.scale, l.bias, steps, false, residual ? residual + first * image_bytes : nullptr,
            static_cast<char*>(l.output) + first * image_bytes, stride, stride, i.planes, l.dtype, l.activation,
            goes_past_caches(l.output, i.count * image_bytes, side_by_side * size)};
}

}  // namespace fastkd
