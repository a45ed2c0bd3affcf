// Who computes an int8 linear layer, and what is in its scratch memory.
//
// Few rows: reading the weights is what takes time. A warp reads 16 rows of them straight into its registers, once, and
// multiplies them by all rows of the input; nothing goes through memory but the output. Up to kFusedRows rows, a block also
// quantises the input by itself. That reads the input again for every 16 columns, rows * size / 16 of the bytes of the
// weights, from the L2 cache, and saves a launch and the way of the numbers through memory, about 2 us. With more rows
// that is no gain any more: from 8 on, 16 bits each, as many bytes are read again as there are of weights.
//
// Many rows: the numbers are multiplied in tiles, and the input would be read and quantised again for every tile of columns,
// two or four times the bytes of its numbers each time. So one pass writes the numbers to scratch memory, each once.
// Where there are few tiles, several blocks share the terms of one, and another kernel adds up their parts. That is also how
// sums are exact that 32 bits cannot hold.
#pragma once
#include <algorithm>

#include "int8_finish.cuh"
#include "launch.cuh"

namespace fastkd::cuda {

constexpr int64_t kMostTerms = int64_t{1} << 17;  // of a 32-bit sum: 2^17 * 127 * 128 < 2^31
constexpr int kFewRows = 16, kFusedRows = 4;
constexpr int kFewColumns = 16;                   // of a block
constexpr int kSmall = 64, kLarge = 128;          // rows and columns of a tile
constexpr int kDepth = 64;                        // terms that a tile takes at a time
constexpr int64_t kLeastTerms = 256;              // of a part

struct Int8Plan {
    bool fused, few, large;
    int64_t pitch;                          // of a row of numbers, the rest is 0
    int64_t parts, part_terms, part_pitch;  // of sums, with whole groups of four columns
    // Where the parts of the scratch memory begin, in bytes.
    int64_t steps, numbers, sums, bytes;

    Int8Plan(int64_t rows, int64_t terms, int64_t columns, int64_t processors) {
        pitch = divide_up(terms, kDepth) * kDepth;
        // A block of few rows reads its weights alone: long rows of few columns are for several.
        const bool shared = 2 * columns < processors * kFewColumns && terms > 32 * kLeastTerms;
        few = rows <= kFewRows && terms <= kMostTerms && !shared;
        fused = few && rows <= kFusedRows;
        const auto tiles = [&](int64_t size) { return divide_up(rows, size) * divide_up(columns, size); };
        large = !few && 4 * tiles(kLarge) >= 3 * processors;
        const int64_t blocks = large ? 1 : 2 * processors / tiles(kSmall);
        const int64_t wanted = few ? 1 : std::max(divide_up(terms, kMostTerms), std::min(blocks, terms / kLeastTerms));
        part_terms = std::max<int64_t>(1, divide_up(pitch / kDepth, std::max<int64_t>(1, wanted))) * kDepth;
        parts = std::max<int64_t>(1, divide_up(terms, part_terms));
        part_pitch = divide_up(columns, kFour) * kFour;
        steps = 0;
        numbers = divide_up(rows * static_cast<int64_t>(sizeof(float)), 16) * 16;
        sums = numbers + rows * pitch;
        bytes = fused ? 0 : sums + (parts > 1 ? parts * rows * part_pitch * static_cast<int64_t>(sizeof(int)) : 0);
    }
};

struct FewRows {
    Input input;
    const int8_t* numbers;  // of the input, or null where a block makes them
    const float* steps;
    int64_t rows, pitch;
    const int8_t* weight;
    int64_t terms;
    Epilogue epilogue;
};
void multiply_few_rows(Launcher& launch, const FewRows& p, bool aligned);

struct Tiles {
    const int8_t* numbers;
    const float* steps;
    int64_t rows, pitch;
    const int8_t* weight;
    int64_t terms, part_terms, part_pitch;
    int* sums;  // of the parts, or null if there is one
    Epilogue epilogue;
    int64_t row_tiles, column_tiles;
};
void multiply_tiles(Launcher& launch, const Tiles& p, bool aligned, bool large, int64_t parts);

}  // namespace fastkd::cuda
