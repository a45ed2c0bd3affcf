#include "int8_pack.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

// Some columns of one part, from `first` on: what the sums begin with, then the words.
void pack_piece(const Packing& p, int64_t group, int64_t part, int64_t first, int64_t width, const int8_t* weight, char* out) {
    const int64_t size = p.layout.group, terms = p.shape.terms, taps = p.shape.taps, numbers = p.joined * terms;
    const int64_t begin = part * p.part_words, count = p.words_of(part);
    char* words = out + width * sizeof(int32_t);
    std::memset(out, 0, width * (sizeof(int32_t) + count * size));
    for (int64_t c = 0; c < std::min(width, p.columns - first); ++c) {
        const int8_t* row = weight + (group * p.columns + first + c) * terms * taps;
        uint32_t sum = 0;
        for (int64_t word = 0; word < count; ++word) {
            const int64_t tap = (begin + word) / p.run_words * p.joined, number = (begin + word) % p.run_words * size;
            for (int64_t j = 0; j < std::min(size, numbers - number); ++j) {
                const int8_t w = row[(number + j) % terms * taps + tap + (number + j) / terms];
                words[(word * width + c) * size + j] = w;
                sum += static_cast<uint32_t>(w);
            }
        }
        const uint32_t start = 0 - sum * static_cast<uint32_t>(p.layout.zero);
        std::memcpy(out + c * sizeof start, &start, sizeof start);
    }
}

void pack_planes(const Packing& p, const int8_t* weight, char* packed) {
    const int64_t taps = p.shape.taps;
    for (int64_t c = 0; c < p.shape.channels; ++c) {
        const uint32_t sum = static_cast<uint32_t>(std::accumulate(weight + c * taps, weight + (c + 1) * taps, int64_t{0}));
        const uint32_t start = 0 - sum * static_cast<uint32_t>(p.layout.zero);
        std::memcpy(packed + p.starts() + c * sizeof start, &start, sizeof start);
    }
    std::copy_n(weight, p.shape.channels * taps, packed + p.rows());
}

// Where a channel is among kPixelChannels.
int64_t pixel_place(int64_t c) { return c % 16 / 4 * 16 + c / 16 * 4 + c % 4; }

void pack_pixels(const Packing& p, const int8_t* weight, char* packed) {
    const int64_t taps = p.shape.taps, width = p.shape.width;
    std::memset(packed + p.pixel_words(0), 0, p.pixel_words(p.pixel_blocks()) - p.pixel_words(0));
    for (int64_t c = 0; c < p.shape.channels; ++c, weight += taps) {
        char* out = packed + p.pixel_words(c / kPixelChannels) + pixel_place(c % kPixelChannels) * 4;
        std::memcpy(out, packed + p.starts() + c * 4, 4);
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t y = tap / width, x = tap % width;
            for (int64_t next = 0; next < 2; ++next) {
                const int64_t word = 1 + (y * p.pixel_words_of_line() + (x + next) / 4) * 2 + next;
                out[word * kPixelWords + (x + next) % 4] = static_cast<char>(weight[tap]);
            }
        }
    }
}

}  // namespace

void int8_pack(const Packing& p, const int8_t* weight, char* packed, int threads) {
    prefer_huge_pages(packed, p.bytes());
    const int64_t blocks = p.shape.groups * p.parts * p.blocks, numbers = p.words_of(0) * p.layout.group * kMostColumns;
    for_each_chunk(blocks, numbers, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t group = i / (p.parts * p.blocks), part = i / p.blocks % p.parts, block = i % p.blocks;
            const int64_t last = p.first_panel(block + 1), bytes = p.layout.lanes * (4 + p.words_of(part) * p.layout.group);
            char* out = packed + p.offset(group, part, block);
            for (int64_t panel = p.first_panel(block); panel < last; panel += p.together) {
                const int64_t count = std::min(p.together, last - panel);
                pack_piece(p, group, part, panel * p.layout.lanes, count * p.layout.lanes, weight, out);
                out += count * bytes;
            }
        }
    });
    if (p.depthwise) pack_planes(p, weight, packed);
    if (p.depthwise && p.four) pack_pixels(p, weight, packed);
}

}  // namespace fastkd
