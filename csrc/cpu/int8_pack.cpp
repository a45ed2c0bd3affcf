#include "int8_pack.h"

#include <cstring>
#include <vector>

#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

// Some columns of one part, from `first` on: what the sums begin with, then the words.
void pack_piece(const Packing& p, int64_t group, int64_t part, int64_t first, int64_t width, const int8_t* weight, char* out) {
    const int64_t size = p.layout.group, terms = p.shape.terms, taps = p.shape.taps;
    const int64_t begin = part * p.part_words, count = p.words_of(part);
    char* words = out + width * sizeof(int32_t);
    std::memset(out, 0, width * (sizeof(int32_t) + count * size));
    for (int64_t c = 0; c < std::min(width, p.columns - first); ++c) {
        const int8_t* row = weight + (group * p.columns + first + c) * terms * taps;
        uint32_t sum = 0;
        for (int64_t word = 0; word < count; ++word) {
            const int64_t tap = (begin + word) / p.tap_words, term = (begin + word) % p.tap_words * size;
            for (int64_t j = 0; j < std::min(size, terms - term); ++j) {
                const int8_t w = row[(term + j) * taps + tap];
                words[(word * width + c) * size + j] = w;
                sum += static_cast<uint32_t>(w);
            }
        }
        const uint32_t start = 0 - sum * static_cast<uint32_t>(p.layout.zero);
        std::memcpy(out + c * sizeof start, &start, sizeof start);
    }
}

}  // namespace

void int8_pack(const Packing& p, const int8_t* weight, char* packed, int threads) {
    prefer_huge_pages(packed, p.bytes());
    const int64_t blocks = p.shape.groups * p.parts * p.blocks, numbers = p.words_of(0) * p.layout.group * kMostColumns;
    for_each_chunk(blocks, numbers, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t group = i / (p.parts * p.blocks), part = i / p.blocks % p.parts, block = i % p.blocks;
            const int64_t end = p.first_panel(block + 1), bytes = p.layout.lanes * (4 + p.words_of(part) * p.layout.group);
            char* out = packed + p.offset(group, part, block);
            for (int64_t panel = p.first_panel(block); panel < end; panel += p.together) {
                const int64_t count = std::min(p.together, end - panel);
                pack_piece(p, group, part, panel * p.layout.lanes, count * p.layout.lanes, weight, out);
                out += count * bytes;
            }
        }
    });
}

}  // namespace fastkd
