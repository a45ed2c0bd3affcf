// Sums of products of int8 numbers, exact modulo 2^32. Included by one unit for each instruction set.
#pragma once
#include "int8_finish-inl.h"
#include "int8_quantize-inl.h"
#include "prefetch.h"

namespace fastkd {
namespace {

// Sums of a tile stay in registers: 24 of 32 where a register has 16 lanes, elsewhere 8 of 16.
constexpr int kSums = W == 16 ? 24 : 8, kPanels = W == 16 ? 4 : 2, kProductRows = W == 16 ? 8 : 4;
static_assert(kPanels * W <= kMostColumns && kPanels <= 4 && kProductRows <= kMostRows);
constexpr int64_t kWordBytes = W * kPerWord;  // of a panel

// A word of each column, as the products take them; what these add to the sums.
#if defined(__AVX512VNNI__)
FASTKD_INLINE vi load_weights(const char* p) {
    vi w;
    __builtin_memcpy(&w, p, sizeof w);
    return w;
}
FASTKD_INLINE vi add_products(vi sums, vi numbers, vi w) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)numbers, (__m512i)w);
}
#else
// Of 16 bits each. The instruction that multiplies bytes would saturate at 2^15, with no error.
FASTKD_INLINE vi load_weights(const char* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(2 * W)));
    typedef int16_t Pairs __attribute__((vector_size(4 * W)));
    Bytes w;
    __builtin_memcpy(&w, p, sizeof w);
    return (vi)__builtin_convertvector(w, Pairs);
#endif
}
FASTKD_INLINE vi add_products(vi sums, vi numbers, vi w) {
#if defined(__AVX512F__)
    return sums + (vi)_mm512_madd_epi16((__m512i)numbers, (__m512i)w);
#elif defined(__AVX2__)
    return sums + (vi)_mm256_madd_epi16((__m256i)numbers, (__m256i)w);
#elif defined(__x86_64__)
    return sums + (vi)_mm_madd_epi16((__m128i)numbers, (__m128i)w);
#else
    return sums + (numbers << 16 >> 16) * (w << 16 >> 16) + (numbers >> 16) * (w >> 16);
#endif
}
#endif

FASTKD_INLINE vi broadcast_word(const char* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word - vi{};
}

// Panels of a block, and where their sums go.
struct Int8Panels {
    const char* pieces[2];  // of kTogether panels: what the sums begin with, then the words
    char* sums;
    int64_t pitch;          // bytes
    int64_t column;         // of the first
};

// Numbers of a layer, and its weights.
struct LayerWords {
    static constexpr int64_t kBytes = kWordBytes;
    static constexpr bool kFinished = true;  // by the tile, where it can be
    static vi load(const char* p) { return load_weights(p); }
    static vi add(vi sums, vi numbers, vi w) { return add_products(sums, numbers, w); }
};

// Where the words of so many panels are: an address for each piece, for the rows need the other registers.
template <int panels, class Words>
class PanelWords {
  public:
    explicit PanelWords(const Int8Panels& b) {
#pragma GCC unroll 2
        for (int i = 0; i < kPieces; ++i) at_[i] = b.pieces[i] + together(i) * sizeof(vi);
    }
    vi load(int p) const { return Words::load(at_[p / kTogether] + p % kTogether * Words::kBytes); }
    void next() {
#pragma GCC unroll 2
        for (int i = 0; i < kPieces; ++i) at_[i] += together(i) * Words::kBytes;
    }

  private:
    static constexpr int kPieces = (panels + kTogether - 1) / kTogether;
    static constexpr int together(int i) { return panels - i * kTogether < kTogether ? 1 : kTogether; }
    const char* at_[kPieces];
};

// The lines of the cache that the sums of a tile will be written to, one with each word: all at once they would be in the way
// of weights that are read meanwhile.
template <int rows, int panels>
class TileLines {
  public:
    static constexpr int kOfRow = (panels * static_cast<int>(sizeof(vf)) + kLine - 1) / kLine, kCount = rows * kOfRow;
    TileLines(const Int8Lines* l, int64_t column)
        : output_(l ? static_cast<const float*>(l->output) + column : nullptr), stride_(l ? l->output_stride : 0) {}
    const char* at(int i) const {
        return reinterpret_cast<const char*>(output_ + i / kOfRow * stride_) + i % kOfRow * kLine;
    }

  private:
    const float* output_;
    int64_t stride_;
};

template <class Given, bool fetching>
struct ProductTile {
    typedef Given Words;
    template <int rows, int panels>
    static void compute(const Int8Rows& a, const Int8Panels& b);
};

// Not inlined: within a larger function gcc 12 keeps the sums in memory, at half the speed.
template <class Words, bool fetching>
template <int rows, int panels>
__attribute__((noinline)) void ProductTile<Words, fetching>::compute(const Int8Rows& a, const Int8Panels& b) {
    PanelWords<panels, Words> weights(b);
    vi sums[rows * panels];
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) __builtin_memcpy(&sums[p], b.pieces[p / kTogether] + p % kTogether * sizeof(vi), sizeof(vi));
#pragma GCC unroll 24
    for (int i = panels; i < rows * panels; ++i) sums[i] = sums[i % panels];
    const TileLines<rows, panels> lines(fetching ? a.lines : nullptr, b.column);
    int line = 0;
    const char* ahead = a.ahead;
    for (const Run* run = a.runs; run < a.runs + a.count; ++run) {
        const char* end[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) end[r] = a.at[r] + run->offset + 4 * run->words;
        for (int64_t word = -run->words; word < 0; ++word) {
            vi w[panels];
#pragma GCC unroll 4
            for (int p = 0; p < panels; ++p) w[p] = weights.load(p);
            weights.next();
            __builtin_prefetch(ahead, 0, 2);
            ahead += kLine;
            if (fetching) {
                expect_write(lines.at(line));
                line += line + 1 < lines.kCount;
            }
#pragma GCC unroll 24
            for (int i = 0; i < rows * panels; ++i) {
                sums[i] = Words::add(sums[i], broadcast_word(end[i / panels] + 4 * word), w[i % panels]);
            }
        }
    }
    if (Words::kFinished && a.lines) return finish_tile<rows, panels>(*a.lines, b.column, sums);
    char* to = b.sums;
    const int64_t pitch = b.pitch;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r, to += pitch) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) __builtin_memcpy(to + p * sizeof(vi), &sums[r * panels + p], sizeof(vi));
    }
}

// As many panels at a time as the registers hold, in whole pieces: none of the weights is read twice.
template <class Tile, int rows>
FASTKD_INLINE void products_of_rows(const Int8Rows& a, int panels, const char* block, void* sums) {
    constexpr int kMost = kSums / rows < kPanels ? kSums / rows : kPanels;
    const int64_t panel_bytes = sizeof(vi) + a.words * Tile::Words::kBytes;
    for (int first = 0; first < panels;) {
        const int left = panels - first, count = left <= kMost ? left : kTogether;
        const char* piece = block + first * panel_bytes;
        char* to = static_cast<char*>(sums) + first * sizeof(vi);
        const Int8Panels b{{piece, piece + kTogether * panel_bytes}, to, static_cast<int64_t>(panels * sizeof(vi)), first * W};
        switch (count) {
            case 1: Tile::template compute<rows, 1>(a, b); break;
            case 2: Tile::template compute<rows, 2>(a, b); break;
            case 3:
                if constexpr (kMost >= 3) Tile::template compute<rows, 3>(a, b);
                break;
            case 4:
                if constexpr (kMost >= 4) Tile::template compute<rows, 4>(a, b);
        }
        first += count;
    }
}

template <class Tile>
FASTKD_INLINE void products_by(const Int8Rows& a, int rows, int panels, const char* block, void* sums) {
    switch (rows) {
        case 1: return products_of_rows<Tile, 1>(a, panels, block, sums);
        case 2: return products_of_rows<Tile, 2>(a, panels, block, sums);
        case 3: return products_of_rows<Tile, 3>(a, panels, block, sums);
        case 4: return products_of_rows<Tile, 4>(a, panels, block, sums);
#if defined(__AVX512F__)
        case 5: return products_of_rows<Tile, 5>(a, panels, block, sums);
        case 6: return products_of_rows<Tile, 6>(a, panels, block, sums);
        case 7: return products_of_rows<Tile, 7>(a, panels, block, sums);
        case 8: return products_of_rows<Tile, 8>(a, panels, block, sums);
#endif
    }
}

void int8_products(const Int8Rows& a, int rows, int panels, const char* block, int32_t* sums) {
    const bool fetching = a.lines && a.lines->stores == Stores::fetched;
    fetching ? products_by<ProductTile<LayerWords, true>>(a, rows, panels, block, sums)
             : products_by<ProductTile<LayerWords, false>>(a, rows, panels, block, sums);
}

// As many products as registers alone allow: what the benches compare with. Nothing is known of the numbers, so that no
// product can be taken out of the loop.
int64_t int8_peak(int64_t rounds) {
    vi sums[kSums]{}, numbers = (vi)rounded(splat(1.0f)), w = (vi)rounded(splat(2.0f));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) {
            numbers = (vi)rounded((vf)numbers);
            sums[i] = add_products(sums[i], numbers, w);
        }
    }
    vi total = sums[0];
#pragma GCC unroll 24
    for (int i = 1; i < kSums; ++i) total += sums[i];
    volatile int32_t kept = total[0];  // or all of it would be for nothing, and left out
    (void)kept;
    return rounds * kSums * W * kPerWord;
}

}  // namespace
}  // namespace fastkd
