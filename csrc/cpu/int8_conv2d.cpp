#include <vector>

#include "int8_layers.h"
#include "int8_multiply.h"
#include "int8_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

// Images quantised with their padding around them, channels innermost: the taps of an output pixel are then at the same
// distances everywhere, and nothing is copied once for each tap.
class Quantised {
  public:
    Quantised(const Int8Layer& l, const Int8Images& i, const Packing& p)
        : l_(l), i_(i), p_(p), kernels_(active_instruction_set().int8),
          channels_(p.shape.terms * p.shape.groups),
          height(i.height + 2 * i.padding[0]), width(i.width + 2 * i.padding[1]),
          pixel_bytes(p.shape.groups * p.tap_words * 4), line_bytes(width * pixel_bytes), image_bytes(height * line_bytes),
          room(std::max<int64_t>(1, std::min(i.count, kScratch / std::max<int64_t>(1, image_bytes)))),
          numbers(room * image_bytes), steps(room) {}

    void fill(int64_t first, int64_t count) {
        find_steps(first, count);
        for_each_chunk(count * height, channels_ * i_.width, l_.threads, [&](int64_t begin, int64_t end) {
            std::vector<char> line(i_.width * channels_ * kernels_.layout.bytes());
            for (int64_t i = begin; i < end; ++i) {
                char* out = numbers.data() + i * line_bytes;
                fill_line(first + i / height, i % height - i_.padding[0], steps[i / height], line.data(), out);
            }
        });
    }

  private:
    const Int8Layer& l_;
    const Int8Images& i_;
    const Packing& p_;
    const Int8Kernels& kernels_;
    const int64_t channels_;

  public:
    const int64_t height, width;
    const int64_t pixel_bytes, line_bytes, image_bytes;
    const int64_t room;  // images at a time
    const Scratch numbers;
    std::vector<float> steps;

  private:
    const char* input(int64_t number) const { return static_cast<const char*>(l_.input) + number * element_size(l_.dtype); }

    void find_steps(int64_t first, int64_t count) {
        constexpr int64_t kPiece = 16384;
        const int64_t size = channels_ * i_.height * i_.width, pieces = (size + kPiece - 1) / kPiece;
        std::vector<uint32_t> largest(count * pieces);
        for_each_chunk(count * pieces, kPiece, l_.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t from = i % pieces * kPiece;
                const char* x = input((first + i / pieces) * size + from);
                largest[i] = kernels_.largest(x, l_.dtype, std::min(kPiece, size - from));
            }
        });
        for (int64_t i = 0; i < count; ++i) {
            const auto begin = largest.begin() + i * pieces;
            steps[i] = step_of(pieces ? *std::max_element(begin, begin + pieces) : 0, l_.given);
        }
    }

    void fill_line(int64_t image, int64_t y, float step, char* line, char* out) const {
        const int zero = kernels_.layout.zero;
        if (y < 0 || y >= i_.height || is_blank(step)) {
            std::memset(out, zero, line_bytes);
            return;
        }
        const int64_t margin = i_.padding[1] * pixel_bytes;
        std::memset(out, zero, margin);
        std::memset(out + line_bytes - margin, zero, margin);
        if (i_.planes) {
            fill_from_planes(image, y, step, out + margin);
        } else {
            fill_from_pixels(image, y, step, line, out + margin);
        }
    }

    void fill_from_planes(int64_t image, int64_t y, float step, char* out) const {
        const int64_t terms = p_.shape.terms, plane = i_.height * i_.width;
        for (int64_t group = 0; group < p_.shape.groups; ++group) {
            const char* x = input((image * channels_ + group * terms) * plane + y * i_.width);
            char* words = out + group * p_.tap_words * 4;
            kernels_.quantize_planes(x, l_.dtype, plane, terms, i_.width, step, words, pixel_bytes);
        }
    }

    void fill_from_pixels(int64_t image, int64_t y, float step, char* line, char* out) const {
        const char* x = input((image * i_.height + y) * i_.width * channels_);
        const int64_t taken = p_.shape.terms * kernels_.layout.bytes(), given = p_.tap_words * 4;
        if (taken == given) return kernels_.quantize(x, l_.dtype, i_.width * channels_, step, out);
        kernels_.quantize(x, l_.dtype, i_.width * channels_, step, line);
        for (int64_t i = 0; i < i_.width * p_.shape.groups; ++i) {
            std::memcpy(out + i * given, line + i * taken, taken);
            std::memset(out + i * given + taken, kernels_.layout.zero, given - taken);
        }
    }
};

std::vector<Run> taps_of(const Int8Images& i, const Quantised& q, const Packing& p) {
    std::vector<Run> taps;
    for (int64_t y = 0; y < i.kernel[0]; ++y) {
        for (int64_t x = 0; x < i.kernel[1]; ++x) {
            taps.push_back({y * i.dilation[0] * q.line_bytes + x * i.dilation[1] * q.pixel_bytes, p.tap_words});
        }
    }
    return taps;
}

}  // namespace

void int8_conv2d(const Int8Layer& l, const Int8Images& i, const Packing& p) {
    const int64_t height = i.output_size(0, i.height), width = i.output_size(1, i.width);
    const int64_t pixels = height * width, size = p.shape.channels * pixels * element_size(l.dtype);
    if (i.count * size == 0) return;
    Quantised q(l, i, p);
    Int8Grid grid{q.numbers.data(), false, 0, height, width, q.image_bytes, i.stride[0] * q.line_bytes,
                  i.stride[1] * q.pixel_bytes, p.tap_words * 4, parts_of(taps_of(i, q, p), p, 4)};
    const char* residual = static_cast<const char*>(l.residual);
    for (int64_t first = 0; first < i.count; first += q.room) {
        grid.images = std::min(q.room, i.count - first);
        q.fill(first, grid.images);
        const int64_t stride = i.planes ? pixels : p.shape.channels;
        const Int8Epilogue epilogue{l.scale, l.bias, q.steps.data(), false, residual ? residual + first * size : nullptr,
                                    static_cast<char*>(l.output) + first * size, stride, stride, i.planes, l.dtype,
                                    l.activation};
        int8_multiply(grid, p, l.packed, epilogue, l.threads);
    }
}

}  // namespace fastkd
