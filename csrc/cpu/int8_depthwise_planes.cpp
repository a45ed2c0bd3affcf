#include "int8_depthwise_planes.h"

#include <vector>

#include "int8_image_steps.h"
#include "int8_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kSums = 4096;      // at a time: they and what they are made of fit the first cache
constexpr int64_t kInput = 1 << 20;  // bytes that are still in a cache when they are read for the second time
constexpr int64_t kSlack = 256;      // numbers, words or sums that are touched behind the last

// What a thread works in.
struct Room {
    Scratch numbers, padded, expanded, taps, spread, offsets, sums;
};

int32_t* integers(const Scratch& memory) { return reinterpret_cast<int32_t*>(memory.data()); }

// An item is all lines of some planes of an image, or some lines of one plane.
class Planes {
  public:
    Planes(const Int8Layer& l, const Int8Images& i, const Packing& p)
        : l_(l), i_(i), p_(p), kernels_(active_instruction_set().int8), channels_(p.shape.channels),
          height_(i.output_size(0, i.height)), width_(i.output_size(1, i.width)),
          stride_(height_ > 1 ? i.stride[0] : 1), reach_(i.dilation[0] * (i.kernel[0] - 1) + 1),
          together_(std::clamp<int64_t>(kSums / std::max(height_ * width_, i.height * i.width / 4), 1, channels_)),
          lines_(std::clamp<int64_t>(kSums / width_, 1, height_)), bands_((height_ + lines_ - 1) / lines_) {
        std::copy_n(i.kernel, 2, all_.kernel);
        // Whatever the others are, they are between nothing.
        all_.stride[0] = stride_, all_.stride[1] = width_ > 1 ? i.stride[1] : 1;
        all_.dilation[0] = i.dilation[0], all_.dilation[1] = i.kernel[1] > 1 ? i.dilation[1] : 1;
        all_.width = i.width, all_.padding = i.padding[1];
        all_.pitch = (i.width + i.padding[1] + all_.stride[1] - 1) / all_.stride[1] * all_.stride[1];
        all_.words = (i.kernel[1] + kernels_.layout.group - 1) / kernels_.layout.group;
    }

    int64_t items() const { return (channels_ + together_ - 1) / together_ * bands_; }
    int64_t cost() const { return together_ * lines_ * std::max(width_, stride_ * i_.width); }

    Room room() const {
        const int64_t band = std::min(i_.height, lines_ * stride_ + reach_), given = bands_ > 1 ? band : i_.height;
        const int64_t number = kernels_.layout.bytes(), taps = i_.kernel[0] * all_.words;
        const int64_t padded = together_ * needed(lines_) * all_.pitch;
        const int64_t reach = all_.words * kernels_.layout.group * all_.dilation[1];
        const int64_t words = padded / all_.stride[1] + stride_ * (i_.padding[1] + kSlack);
        const int64_t spread = together_ * (lines_ * all_.pitch / all_.stride[1] + kSlack);
        return {Scratch((together_ * given * i_.width + kSlack) * number),
                Scratch((padded + i_.padding[1] + reach + kSlack) * number), Scratch((all_.words * words + kSlack) * 4),
                Scratch((1 + taps) * 4), Scratch(spread * 4), Scratch(taps * 8),
                Scratch((together_ * lines_ * width_ + kSlack) * 4)};
    }

    // Returns the bits of the largest magnitude, if there is a step. Between them the items of an image read all of it.
    uint32_t compute(int64_t image, int64_t item, float step, const Room& room) const {
        const int64_t channel = item / bands_ * together_, band = item % bands_;
        const int64_t y = band * lines_, lines = std::min(lines_, height_ - y), top = y * stride_ - i_.padding[0];
        const int64_t begin = first_line(band);
        const int64_t end = std::max(std::clamp<int64_t>(top + needed(lines), begin, i_.height), first_line(band + 1));
        Int8Convolved plane = all_;
        plane.planes = std::min(together_, channels_ - channel), plane.lines = end - begin;
        plane.needed = needed(lines), plane.above = std::clamp<int64_t>(begin - top, 0, plane.needed);
        plane.output[0] = lines, plane.output[1] = width_;
        plane.numbers = room.numbers.data(), plane.padded = room.padded.data();
        plane.expanded = integers(room.expanded), plane.taps = integers(room.taps), plane.spread = integers(room.spread);
        plane.offsets = reinterpret_cast<int64_t*>(room.offsets.data()), plane.sums = integers(room.sums);
        plane.weights = reinterpret_cast<const int8_t*>(l_.packed + p_.rows()) + channel * p_.shape.taps;
        plane.starts = reinterpret_cast<const int32_t*>(l_.packed + p_.starts()) + channel;
        const int64_t first = ((image * channels_ + channel) * i_.height + begin) * i_.width;
        const uint32_t most = quantize(first, plane.planes * plane.lines * i_.width, step, room.numbers.data());
        kernels_.plane_products(plane);
        finish(plane, image, channel, y, step);
        return most;
    }

  private:
    // Lines of the padded plane; whole strides of them, so that those of the next plane lie alike.
    int64_t needed(int64_t lines) const {
        return ((lines - 1) * stride_ + reach_ + stride_ - 1) / stride_ * stride_;
    }

    int64_t first_line(int64_t band) const {
        if (band == 0 || band == bands_) return band ? i_.height : 0;
        return std::clamp<int64_t>(band * lines_ * stride_ - i_.padding[0], 0, i_.height);
    }

    uint32_t quantize(int64_t first, int64_t count, float step, char* out) const {
        if (is_blank(step)) {
            std::memset(out, kernels_.layout.zero, count * kernels_.layout.bytes());
            return 0;
        }
        const char* x = static_cast<const char*>(l_.input) + first * element_size(l_.dtype);
        if (l_.given) return kernels_.quantize(x, l_.dtype, count, step, out);
        kernels_.quantize_bounded(x, l_.dtype, count, step, out);
        return 0;
    }

    void finish(const Int8Convolved& plane, int64_t image, int64_t channel, int64_t y, float step) const {
        const int64_t first = ((image * channels_ + channel) * height_ + y) * width_, size = element_size(l_.dtype);
        Int8Lines l;
        l.sums = plane.sums, l.floats = false, l.pitch = l.columns = plane.output[0] * width_, l.lines = plane.planes;
        l.channels_are_lines = true, l.scale = l_.scale + channel, l.bias = l_.bias ? l_.bias + channel : nullptr;
        l.steps = &step, l.steps_stride = 0;
        l.residual = l_.residual ? static_cast<const char*>(l_.residual) + first * size : nullptr;
        l.output = static_cast<char*>(l_.output) + first * size;
        l.residual_stride = l.output_stride = height_ * width_;
        l.dtype = l_.dtype, l.activation = l_.activation;
        kernels_.finish(l);
    }

    const Int8Layer& l_;
    const Int8Images& i_;
    const Packing& p_;
    const Int8Kernels& kernels_;
    const int64_t channels_, height_, width_;  // of the output
    const int64_t stride_, reach_;             // lines from one output to the next, and from the first tap to the last
    const int64_t together_, lines_, bands_;   // planes of an item, lines, and how often that is in a plane
    Int8Convolved all_;                        // what all have in common
};

// The bits of the largest magnitude of each item.
std::vector<uint32_t> compute(const Planes& planes, const Int8Layer& l, int64_t first, const float* steps, int64_t count) {
    const int64_t items = planes.items();
    std::vector<uint32_t> largest(count * items);
    for_each_chunk(count * items, planes.cost(), l.threads, [&](int64_t begin, int64_t end) {
        const Room room = planes.room();
        for (int64_t i = begin; i < end; ++i) {
            largest[i] = planes.compute(first + i / items, i % items, steps[i / items], room);
        }
    });
    return largest;
}

}  // namespace

void int8_depthwise_planes(const Int8Layer& l, const Int8Images& i, const Packing& p) {
    const Planes planes(l, i, p);
    const int64_t size = p.shape.channels * i.height * i.width, bytes = std::max<int64_t>(1, size * element_size(l.dtype));
    const int64_t together = l.given ? i.count : std::clamp<int64_t>(kInput / bytes, 1, i.count);
    for (int64_t first = 0; first < i.count; first += together) {
        std::vector<float> steps(std::min(together, i.count - first), l.given ? *l.given : 0);
        const int64_t count = static_cast<int64_t>(steps.size());
        if (!l.given) find_image_steps(l, size, first, count, steps.data());
        const std::vector<uint32_t> largest = compute(planes, l, first, steps.data(), count);
        if (!l.given) continue;
        for (int64_t image = 0; image < count; ++image) {  // that is not finite is known too late, and computed again
            const float step = step_of(largest_of(largest.data() + image * planes.items(), planes.items()), l.given);
            if (is_blank(step)) compute(planes, l, first + image, &step, 1);
        }
    }
}

}  // namespace fastkd
