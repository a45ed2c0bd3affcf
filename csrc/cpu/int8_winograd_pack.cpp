#include <cstdlib>
#include <cstring>

#include "int8_winograd.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kLargest = 1 << 25;  // outputs are known modulo 2^26

// Three taps of a line, at six points.
void transform(const int32_t* g, int64_t stride, int32_t* u, int64_t step) {
    const int32_t a = g[0], b = g[stride], c = g[2 * stride];
    u[0 * step] = 6 * a;
    u[1 * step] = -4 * (a + b + c);
    u[2 * step] = -4 * (a - b + c);
    u[3 * step] = a + 2 * b + 4 * c;
    u[4 * step] = a - 2 * b + 4 * c;
    u[5 * step] = 6 * c;
}

// At most 12 * 12 * 128: 16 bits.
void transform(const int8_t* weight, int32_t* u) {
    int32_t g[kTaps], lines[3 * kWinogradPoints];
    for (int64_t i = 0; i < kTaps; ++i) g[i] = weight[i];
    for (int64_t x = 0; x < 3; ++x) transform(g + x, 3, lines + x, 3);
    for (int64_t y = 0; y < kWinogradPoints; ++y) transform(lines + 3 * y, 1, u + kWinogradPoints * y, 1);
}

// A piece of `width` columns from `first` on: of every position, `stride` bytes apart.
void pack_piece(const Packing& p, const WinogradPacking& w, int64_t first, int64_t width, const int8_t* weight, char* out,
                int64_t stride) {
    for (int64_t i = 0; i < kWinogradPositions; ++i) std::memset(out + i * stride, 0, width * 4 * (1 + w.words));
    for (int64_t term = 0; term < p.shape.terms; ++term) {
        for (int64_t c = 0; c < std::min(width, p.columns - first); ++c) {
            int32_t u[kWinogradPositions];
            transform(weight + ((first + c) * p.shape.terms + term) * kTaps, u);
            char* to = out + width * 4 + (term / 2 * width + c) * 4 + term % 2 * 2;
            for (int64_t i = 0; i < kWinogradPositions; ++i, to += stride) {
                const int16_t number = static_cast<int16_t>(u[i]);
                std::memcpy(to, &number, sizeof number);
            }
        }
    }
}

bool fits(const int8_t* row, int64_t count) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += std::abs(row[i]);
    return sum * kLevels < kLargest;
}

}  // namespace

bool int8_winograd_pack(const Packing& p, const int8_t* weight, char* packed, int threads) {
    const int64_t size = p.shape.terms * kTaps;
    for (int64_t c = 0; c < p.shape.channels; ++c) {
        if (!fits(weight + c * size, size)) return false;
    }
    const WinogradPacking w(p);
    prefer_huge_pages(packed, w.bytes);
    for_each_chunk(p.blocks, size * kMostColumns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = p.first_panel(block), panels = w.panels(block);
            for (int64_t panel = 0; panel < panels; panel += p.together) {
                const int64_t lanes = p.layout.lanes, count = std::min(p.together, panels - panel);
                char* out = packed + w.offset(block, 0) + panel * w.panel_bytes;
                pack_piece(p, w, (first + panel) * lanes, count * lanes, weight, out, panels * w.panel_bytes);
            }
        }
    });
    return true;
}

}  // namespace fastkd
