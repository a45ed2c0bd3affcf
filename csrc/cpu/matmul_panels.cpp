#include "matmul_panels.h"

#include <algorithm>
#include <memory>

#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kDepth = 128;  // of a panel that is packed at a time: two of them stay in the first-level cache

const ProductKernels<double>& kernels_of(double*) { return active_instruction_set().matmul.wide; }
const ProductKernels<float>& kernels_of(float*) { return active_instruction_set().matmul.narrow; }

bool same(const Factor& a, const Factor& b) {
    return a.data == b.data && a.doubles == b.doubles && a.across == b.across && a.along == b.along;
}

template <class T>
void mirror(const T* block, int64_t rows, int64_t columns, int64_t stride, T* out) {
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < rows; ++i) out[j * stride + i] = block[i * stride + j];
    }
}

}  // namespace

template <class T>
void matmul(const Factor& left, const Factor& right, int64_t rows, int64_t depth, int64_t columns, bool adds, int threads, T* out) {
    const ProductKernels<T>& kernels = kernels_of(static_cast<T*>(nullptr));
    const int64_t panel = kernels.panel, right_panels = (columns + panel - 1) / panel, left_panels = (rows + panel - 1) / panel;
    const bool itself = same(left, right) && rows == columns, symmetric = itself && !adds;
    const int64_t most = std::min(kDepth, depth);
    const std::unique_ptr<T[]> packed(new T[right_panels * panel * most]);  // a vector would fill it first
    for (int64_t begin = 0; begin == 0 || begin < depth; begin += kDepth) {
        const int64_t span = std::min(kDepth, depth - begin), size = panel * span;
        const bool first = begin == 0 && !adds, last = begin + kDepth >= depth;
        for_each_chunk(right_panels, size, threads, [&](int64_t from, int64_t to) {
            for (int64_t j = from; j < to; ++j) {
                kernels.pack(right, j * panel, std::min(panel, columns - j * panel), begin, span, packed.get() + j * size);
            }
        });
        for_each_chunk(left_panels, size * (right_panels + 1), threads, [&](int64_t from, int64_t to) {
            const std::unique_ptr<T[]> mine(new T[itself ? 0 : size]);
            for (int64_t i = from; i < to; ++i) {
                const int64_t height = std::min(panel, rows - i * panel);
                if (!itself) kernels.pack(left, i * panel, height, begin, span, mine.get());
                const T* side = itself ? packed.get() + i * size : mine.get();
                for (int64_t j = symmetric ? i : 0; j < right_panels; ++j) {
                    const int64_t width = std::min(panel, columns - j * panel);
                    T* block = out + i * panel * columns + j * panel;
                    kernels.multiply(side, packed.get() + j * size, span, height, width, block, columns, !first);
                    if (symmetric && last && i != j) mirror(block, height, width, columns, out + j * panel * columns + i * panel);
                }
            }
        });
    }
}

template void matmul(const Factor&, const Factor&, int64_t, int64_t, int64_t, bool, int, double*);
template void matmul(const Factor&, const Factor&, int64_t, int64_t, int64_t, bool, int, float*);

}  // namespace fastkd
