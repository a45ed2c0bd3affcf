#include <vector>

#include "int8_depthwise_pixels.h"
#include "int8_depthwise_planes.h"
#include "int8_images.h"
#include "int8_multiply.h"
#include "logit_task.h"

namespace fastkd {
namespace {

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
    const int64_t size = p.shape.channels * height * width * element_size(l.dtype);
    if (i.count * size == 0) return;
    prefer_huge_pages(l.output, i.count * size);
    if (p.depthwise && i.planes && p.parts == 1) return int8_depthwise_planes(l, i, p);
    QuantisedImages q(l, i, p);
    Int8Grid grid{q.numbers.data(),       p.depthwise ? Int8Grid::depthwise : Int8Grid::words, 0, height, width,
                  q.image_bytes,          i.stride[0] / q.every[0] * q.line_bytes,
                  i.stride[1] / q.every[1] * q.pixel_bytes, p.run_words * 4, parts_of(runs_of(q.taps, p), p, 4)};
    for (int64_t first = 0; first < i.count; first += q.room) {
        grid.images = std::min(q.room, i.count - first);
        q.fill(first, grid.images);
        const Int8Epilogue epilogue = epilogue_of_images(l, i, p, first, q.steps.data());
        if (p.depthwise && p.four && p.parts == 1) {
            int8_depthwise_pixels(grid, q.taps, p, l.packed, epilogue, l.threads);
        } else {
            int8_multiply(grid, p, l.packed, epilogue, l.threads);
        }
    }
}

}  // namespace fastkd
