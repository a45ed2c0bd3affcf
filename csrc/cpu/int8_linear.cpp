#include "int8_layers.h"

#include <vector>

#include "int8_multiply.h"
#include "int8_steps.h"
#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

void quantize_row(const Int8Kernels& kernels, const Int8Layer& l, int64_t row, int64_t stride, int64_t terms, float& step,
                  char* numbers) {
    const void* x = static_cast<const char*>(l.input) + row * stride * element_size(l.dtype);
    if (l.given) {
        step = step_of(kernels.quantize(x, l.dtype, terms, *l.given, numbers), l.given);
        return;
    }
    step = step_of(kernels.largest(x, l.dtype, terms), nullptr);
    if (is_blank(step)) {
        std::memset(numbers, kernels.layout.zero, terms * kernels.layout.bytes());
    } else {
        kernels.quantize_bounded(x, l.dtype, terms, step, numbers);
    }
}

}  // namespace

void int8_linear(const Int8Layer& l, const Int8Matrix& m, const Packing& p) {
    if (p.shape.channels == 0) return;
    prefer_huge_pages(l.output, m.rows * p.shape.channels * element_size(l.dtype));
    const Int8Kernels& kernels = active_instruction_set().int8;
    const int64_t stride = odd_lines(p.words * 4), rows = std::min(m.rows, std::max<int64_t>(1, kScratch / stride));
    const Scratch numbers(rows * stride);
    std::vector<float> steps(rows);
    const std::vector<std::vector<Run>> runs = parts_of({{0, p.words}}, p, 4);
    for (int64_t first = 0; first < m.rows; first += rows) {
        const int64_t count = std::min(rows, m.rows - first);
        for_each_chunk(count, p.shape.terms, l.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                quantize_row(kernels, l, first + i, m.stride, p.shape.terms, steps[i], numbers.data() + i * stride);
            }
        });
        const Int8Grid grid{numbers.data(), Int8Grid::words, 1, 1, count, 0, 0, stride, 0, runs};
        int8_multiply(grid, p, l.packed, epilogue_of_rows(l, m, p, first, steps.data(), true), l.threads);
    }
}

}  // namespace fastkd
