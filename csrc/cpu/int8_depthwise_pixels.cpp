#include "int8_depthwise_pixels.h"

#include "int8_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kStrip = 32;  // pixels: few, so that what is written to is side by side

struct alignas(64) Stage {
    int32_t sums[(kStrip + 3) * kPixelChannels];  // the last few may be for nothing
};

class Strip {
  public:
    Strip(const Int8Grid& g, const Int8Taps& t, const Packing& p, const char* packed, const Int8Epilogue& e)
        : g_(g), p_(p), packed_(packed), e_(e), kernels_(active_instruction_set().int8) {
        all_.pixel = g.pixel_stride, all_.tap = t.tap, all_.line = t.line;
        std::copy_n(t.kernel, 2, all_.kernel);
    }

    // Output pixels from `begin` to `end` of an image, and channels from 64 * `block` on.
    void compute(int64_t image, int64_t begin, int64_t end, int64_t block) {
        const Int8Lines l = lines(image, begin, end, block * kPixelChannels);
        Int8Pixels pixels = all_;
        pixels.weights = packed_ + p_.pixel_words(block);
        const char* numbers = g_.numbers + image * g_.image_stride + block * kPixelChannels;
        for (int64_t pixel = begin; pixel < end; pixel += pixels.count) {
            const int64_t y = pixel / g_.width, x = pixel % g_.width;
            pixels.numbers = numbers + y * g_.line_stride + x * g_.pixel_stride;
            pixels.count = std::min(g_.width - x, end - pixel);
            pixels.sums = stage_.sums + (pixel - begin) * kPixelChannels;
            kernels_.pixel_products(pixels);
        }
        kernels_.finish(l);
    }

  private:
    Int8Lines lines(int64_t image, int64_t begin, int64_t end, int64_t channel) const {
        const int64_t columns = std::min<int64_t>(kPixelChannels, p_.shape.channels - channel);
        Int8Lines l = e_.lines(image, g_.height * g_.width, p_.shape.channels, begin, end, channel, columns);
        l.sums = stage_.sums, l.pitch = kPixelChannels;
        return l;
    }

    const Int8Grid& g_;
    const Packing& p_;
    const char* packed_;
    const Int8Epilogue& e_;
    const Int8Kernels& kernels_;
    Int8Pixels all_;
    Stage stage_;
};

}  // namespace

void int8_depthwise_pixels(const Int8Grid& g, const Int8Taps& t, const Packing& p, const char* packed, const Int8Epilogue& e,
                           int threads) {
    const int64_t pixels = g.height * g.width, strips = (pixels + kStrip - 1) / kStrip;
    const int64_t blocks = (p.shape.channels + kPixelChannels - 1) / kPixelChannels;
    const int64_t items = g.images * strips * blocks, cost = std::min(pixels, kStrip) * kPixelChannels;
    for_each_chunk(items, cost, threads, [&](int64_t begin, int64_t end) {
        Strip strip(g, t, p, packed, e);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i / blocks % strips * kStrip;
            strip.compute(i / (strips * blocks), first, std::min(pixels, first + kStrip), i % blocks);
        }
        after_stores_past_caches();
    });
}

}  // namespace fastkd
