#include <vector>

#include "int8_layers.h"
#include "int8_multiply.h"
#include "int8_steps.h"
#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {

void int8_weight_only(const Int8Layer& l, const Int8Matrix& m, const Packing& p) {
    if (p.shape.channels == 0) return;
    prefer_huge_pages(l.output, m.rows * p.shape.channels * element_size(l.dtype));
    const Int8Kernels& kernels = active_instruction_set().int8;
    const int64_t terms = p.shape.terms, padded = p.words * p.layout.group, word_bytes = p.layout.group * sizeof(float);
    const int64_t stride = odd_lines(padded * sizeof(float)), size = element_size(l.dtype);
    const int64_t rows = std::min(m.rows, std::max<int64_t>(1, kScratch / stride));
    const Scratch floats(rows * stride);
    const std::vector<std::vector<Run>> runs = parts_of({{0, p.words}}, p, word_bytes);
    const float one = 1;
    for (int64_t first = 0; first < m.rows; first += rows) {
        const int64_t count = std::min(rows, m.rows - first);
        for_each_chunk(count, terms, l.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                float* out = reinterpret_cast<float*>(floats.data() + i * stride);
                kernels.widen(static_cast<const char*>(l.input) + (first + i) * m.stride * size, l.dtype, terms, out);
                std::fill(out + terms, out + padded, 0.0f);  // a NaN times a weight of 0 would be one
            }
        });
        const Int8Grid grid{floats.data(), Int8Grid::floats, 1, 1, count, 0, 0, stride, 0, runs};
        int8_multiply(grid, p, l.packed, epilogue_of_rows(l, m, p, first, &one, false), l.threads);
    }
}

}  // namespace fastkd
