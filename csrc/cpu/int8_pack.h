// The weights of an int8 layer in the order that the products read them in (int8.h).
//
// A group of a convolution after the other; within it parts of at most kMostTerms numbers of a sum, which 32 bits can hold;
// within these blocks of panels, as alike in width as can be; within these pieces of `together` panels.
#pragma once
#include <algorithm>
#include <cstdint>

#include "int8.h"

namespace fastkd {

constexpr int64_t kMostTerms = 131072;  // 2^17 * 127 * 128 < 2^31
constexpr int64_t kFewTerms = 8;        // one word or two of each tap, in which what is left empty is much

// (channels, terms, taps): a linear layer has one tap, and a convolution as many terms as a group has input channels.
// `width` of the taps are a line; 1, where there are pixels between them.
struct Int8Shape {
    int64_t channels, terms, taps, groups, width;
};

// A convolution of each channel by itself is packed as one group, whose rows are the taps, one to a word.
inline bool is_depthwise(const Int8Shape& s) { return s.groups > 1 && s.terms == 1 && s.channels == s.groups; }

// Taps whose numbers follow each other without a gap: those of a line, where few terms would not fill whole words.
inline int64_t joined_taps(const Int8Shape& s, const Int8Layout& of) {
    return s.groups == 1 && s.terms <= kFewTerms && s.terms % of.group ? s.width : 1;
}

class Packing {
  public:
    Packing(const Int8Shape& given, const Int8Layout& of)
        : depthwise(is_depthwise(given)), four(of.group == 4),
          shape{given.channels, given.terms, given.taps, depthwise ? 1 : given.groups, given.width},
          layout{of.lanes, of.panels, of.rows, of.sums, depthwise ? 4 : of.group, of.zero},
          columns(shape.groups ? shape.channels / shape.groups : 0),
          panels((columns + layout.lanes - 1) / layout.lanes),
          blocks((panels + layout.panels - 1) / layout.panels),
          together(depthwise ? layout.panels : kTogether),
          joined(depthwise ? 1 : joined_taps(given, of)),
          run_words((joined * shape.terms + layout.group - 1) / layout.group),
          words(run_words * (shape.taps / joined)),
          part_words(kMostTerms / layout.group),
          parts(std::max<int64_t>(1, (words + part_words - 1) / part_words)) {}

    // The first panel of a block; that of the next is one past its last.
    int64_t first_panel(int64_t block) const {
        return blocks == 0 ? 0 : block * (panels / blocks) + std::min(block, panels % blocks);
    }
    int64_t words_of(int64_t part) const { return std::min(part_words, words - part * part_words); }
    int64_t bytes() const { return !depthwise ? bytes_of_panels() : four ? pixel_words(pixel_blocks()) : rows_end(); }
    // Of a convolution of each channel by itself there is more, for the other ways to compute it. For planes: what the sums
    // of each channel begin with, and its weights as they are, with four bytes behind the last.
    int64_t starts() const { return bytes_of_panels(); }
    int64_t rows() const { return starts() + shape.channels * 4; }
    // For pixels, where words have four numbers: of kPixelChannels what the sums begin with, then the words of each line of
    // the kernel: those of a pixel, then those of the next pixel for the same numbers. Channels in the order of
    // int8_pixels-inl.h.
    int64_t pixel_blocks() const { return (shape.channels + kPixelChannels - 1) / kPixelChannels; }
    int64_t pixel_words_of_line() const { return shape.width / 4 + 1; }
    int64_t pixel_words(int64_t block) const {
        const int64_t words = 1 + shape.taps / shape.width * pixel_words_of_line() * 2;
        return (rows_end() + 63) / 64 * 64 + block * words * kPixelWords;
    }
    int64_t offset(int64_t group, int64_t part, int64_t block) const {
        const int64_t before = part * panels * bytes_of_panel(part_words);
        return group * bytes_of_group() + before + first_panel(block) * bytes_of_panel(words_of(part));
    }

    const bool depthwise, four;  // numbers of a word
    const Int8Shape shape;
    const Int8Layout layout;
    const int64_t columns;  // of a group
    const int64_t panels, blocks, together;
    const int64_t joined;            // taps of a run
    const int64_t run_words, words;  // of a run, and of a group's row
    const int64_t part_words, parts;

  private:
    int64_t bytes_of_panels() const { return shape.groups * bytes_of_group(); }
    int64_t rows_end() const { return rows() + shape.channels * shape.taps + 4; }
    int64_t bytes_of_panel(int64_t words) const { return layout.lanes * (4 + words * layout.group); }
    int64_t bytes_of_group() const {
        return panels * ((parts - 1) * bytes_of_panel(part_words) + bytes_of_panel(words_of(parts - 1)));
    }
};

// `weight`: [channels][terms][taps].
void int8_pack(const Packing&, const int8_t* weight, char* packed, int threads);

}  // namespace fastkd
