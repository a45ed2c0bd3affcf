// The pieces of int8 layers, on pointers and sizes: what every instruction set implements, once per table entry. What the
// numbers are is in fastkd/_int8.py.
//
// Numbers of a row lie in words of 32 bits, as many as one instruction multiplies and adds: four bytes where the processor
// has VNNI, which takes them without a sign (128 more than they are), elsewhere two of 16 bits. `lanes` columns of weights
// are a panel. Two panels are a piece, whose words lie together in the order that they are read in, and two pieces a block:
// few rows read a block at once, in two streams, and more rows, for whose sums the registers are too few, piece by piece. A
// piece begins with what its sums begin with, which takes the 128 back.
#pragma once
#include <stdint.h>

#include "logit.h"

namespace fastkd {

enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu };

// The lines of the cache that an output goes to are near, or are fetched while its sums are made, or are passed by.
enum class Stores : int32_t { near, fetched, past_caches };

constexpr int kMostColumns = 64;                 // of a block
constexpr int kMostRows = 8;                     // of a product
constexpr int kTogether = 2;                     // panels whose words lie together
constexpr int kPixelChannels = 64;               // of pixels, each channel convolved by itself, at a time
constexpr int kPixelWords = 4 * kPixelChannels;  // bytes of a word of each
constexpr int kLevels = 127;                     // on each side of zero
constexpr int kWinogradTile = 4, kWinogradPoints = 6, kWinogradPositions = 36;  // int8_winograd.h

struct Int8Layout {
    int lanes;   // columns of a panel
    int panels;  // of a block, at most
    int rows;    // that a product takes, at most
    int sums;    // vectors of them that the registers hold: with more rows than fit, a block is read in parts
    int group;   // numbers of a word
    int zero;    // what stands for the number 0
    int bytes() const { return 4 / group; }  // of a number
    int rows_of(int block_panels) const { return sums / block_panels < rows ? sums / block_panels : rows; }
};

// Where the words of a row are: several runs, one for each tap of a convolution.
struct Run {
    int64_t offset;  // bytes from the row's address
    int64_t words;
};

struct Int8Rows {
    const char* at[kMostRows];
    const Run* runs;
    int64_t count;   // of runs
    int64_t words;   // of all of them
    const char* ahead;  // what will be read next: with each word of these rows a line of the cache is fetched
    const struct Int8Lines* lines;  // of these rows, where the sums of whole panels go at once; null: to `sums`
};

// Sums on their way to the output. A line is a row of numbers that lie side by side in it: columns (channels) of a row, or
// pixels of a channel. What belongs to a channel is indexed by column or by line accordingly.
struct Int8Lines {
    const void* sums;  // int32, or float where one integer could not hold them
    bool floats;
    int64_t pitch;     // numbers from line to line
    int64_t lines, columns;
    bool channels_are_lines;
    const float *scale, *bias;  // of channels; no bias: null
    const float* steps;         // of the quantised rows or images, the stride 0 for one of all
    int64_t steps_stride;       // from line to line
    const void* residual;       // or null
    void* output;
    int64_t residual_stride, output_stride;  // numbers from line to line
    Dtype dtype;
    Activation activation;
    Stores stores = Stores::near;
};

// Pixels from planes of channels, to words of one pixel side by side. The rest of the last word is the number 0, or belongs
// to the next pixel where `pixel_bytes` are fewer; only one vector of words may be cut short like this.
struct Int8Planes {
    const void* x;
    Dtype dtype;
    int64_t plane;     // numbers from one channel to the next
    int64_t channels;  // given
    int64_t width, lines;
    float step;
    char* words;
    int64_t pixel_bytes, line_bytes;  // of the words, from one pixel and line to the next
    bool bounded;                     // as below: then nothing is returned
};

// Planes, or some lines of each, that are convolved by themselves: int8_planes-inl.h.
struct Int8Convolved {
    const void* numbers;           // quantised
    int64_t planes, lines, width;  // of these
    int64_t above, needed;         // lines of padding before them, and lines in all that the output needs
    int64_t padding, pitch;        // numbers before a line, and from one line to the next
    int64_t kernel[2], stride[2], dilation[2], output[2];
    int64_t words;                 // that hold a line of the kernel
    const int8_t* weights;         // of each plane, a line of the kernel after the other
    const int32_t* starts;         // what the sums of each plane begin with
    // Memory: for the planes with their padding, the words of one, those of a kernel and where they belong, and the sums of
    // one plane.
    void* padded;
    int32_t *expanded, *taps, *spread;
    int64_t* offsets;
    int32_t* sums;                 // without gaps, and a vector more
};

// Pixels of a line of the output, channels innermost, of which each is convolved by itself: int8_pixels-inl.h.
struct Int8Pixels {
    const char* numbers;       // of the first tap of the first pixel
    int64_t pixel, tap, line;  // bytes to the next pixel, the next tap and the next line of taps
    int64_t kernel[2];
    int64_t count;
    const char* weights;       // int8_pack.h
    int32_t* sums;             // kPixelChannels of each pixel; of up to three more for nothing
};

// A tile of a convolution of 3 x 3 taps, int8_winograd-inl.h: from the numbers of its pixels to a row at each position, and
// from the sums of these rows' products to those of the outputs.
struct WinogradNumbers {
    int down, across;     // outputs
    const char* numbers;  // of the first pixel
    int64_t line, pixel;  // bytes to the next
    int64_t channels;
    char* out;            // whole vectors
    int64_t position;     // bytes to the next position's
};

// The points of a line of so many outputs, the last being infinity. (Each unit has its own: vec.h.)
static constexpr bool has_winograd_point(int outputs, int point) {
    return point <= outputs || point == kWinogradPoints - 1;
}

struct WinogradSums {
    int down, across;
    const int32_t* sums;
    int64_t position, columns;  // sums to the next position's; columns of whole panels
    int32_t* out;
    int64_t line, pixel;        // sums to the next
    const Int8Lines* lines;     // of the first line of outputs, `line` of these apart, if sums go there at once; else null
};

struct Int8Kernels {
    Int8Layout layout;
    // The bits of the largest |x|, as a float: those of a NaN are above infinity's.
    uint32_t (*largest)(const void* x, Dtype, int64_t n);
    // Numbers side by side, without padding. With a step that was known before this returns what `largest` does; where the
    // step is that of the largest |x|, `bounded`, there is less to do.
    uint32_t (*quantize)(const void* x, Dtype, int64_t n, float step, void* numbers);
    void (*quantize_bounded)(const void* x, Dtype, int64_t n, float step, void* numbers);
    uint32_t (*quantize_planes)(const Int8Planes&);
    // sums[r * panels * lanes + c], of at most layout.rows rows and a block of `panels` panels. Or at once to the output, which
    // is float32 then, of a layer with a bias, without a residual and with no activation but relu.
    void (*products)(const Int8Rows&, int rows, int panels, const char* block, int32_t* sums);
    // columns of lines, and lines of columns: [rows][columns] to [columns][pitch], of whole panels.
    void (*transpose)(const int32_t* sums, int64_t rows, int64_t columns, int32_t* out, int64_t pitch);
    void (*finish)(const Int8Lines&);
    // As products, where each channel has its own column: a row's words are its taps, and of each the first bytes count.
    void (*depthwise_products)(const Int8Rows&, int rows, int panels, const char* block, int32_t* sums);
    void (*plane_products)(const Int8Convolved&);
    void (*pixel_products)(const Int8Pixels&);  // null, unless words have four numbers
    // Rows of floats, `group` of them in the place of a word.
    void (*float_products)(const Int8Rows&, int rows, int panels, const char* block, float* sums);
    void (*winograd_numbers)(const WinogradNumbers&);
    // As products, of rows whose numbers and weights have 16 bits.
    void (*winograd_products)(const Int8Rows&, int rows, int panels, const char* block, int32_t* sums);
    void (*winograd_sums)(const WinogradSums&);
    void (*widen)(const void* x, Dtype, int64_t n, float* out);
    void (*dequantize)(const int8_t* numbers, int64_t n, float scale, void* out, Dtype);
    // Products in registers alone, `rounds` times as many as these hold; returns how many.
    int64_t (*peak)(int64_t rounds);
};

}  // namespace fastkd
