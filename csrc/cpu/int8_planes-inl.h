// Convolutions of each plane by itself: lanes are pixels of an output line. Included by one unit for each instruction set.
//
// The taps of a line of the kernel go into words, as many as a word has numbers; and so do, once for each line of a padded
// plane, the numbers that these meet at each output pixel. From there on nothing is left but products of words, with no
// shuffling, however wide the kernel, its stride and its dilation are.
#pragma once
#include "int8_products-inl.h"

namespace fastkd {
namespace {

constexpr int kNumberBits = 32 / kPerWord;
constexpr uint32_t kNumberMask = (1u << kNumberBits) - 1;

// A vector of any size with the number 0 from one of them on.
template <class Chunk>
struct Edge {
    Chunk zeros, taken, rest;

    explicit Edge(int64_t numbers) {
        char bytes[2 * sizeof(Chunk)];
        __builtin_memset(bytes, 0xff, sizeof(Chunk));
        __builtin_memset(bytes + sizeof(Chunk), 0, sizeof(Chunk));
        __builtin_memcpy(&taken, bytes + sizeof(Chunk) - numbers * sizeof(Number), sizeof taken);
        __builtin_memset(&zeros, kZero, sizeof zeros);
        rest = zeros & ~taken;
    }
};

// Lines with padding between them: that on the right of one is also that on the left of the next. What is written behind
// a line is overwritten by the next.
template <class Chunk>
static void pad_lines(const Int8Convolved& p, const Edge<Chunk>& edge, const Number* from, int64_t lines, Number* to) {
    constexpr int64_t kChunk = sizeof(Chunk) / sizeof(Number);
    const int64_t width = p.width, pitch = p.pitch, whole = width / kChunk * kChunk;
    for (int64_t y = 0; y < lines; ++y, from += width, to += pitch) {
        Chunk chunk;
        int64_t i = 0;
        for (; i < whole; i += kChunk) {
            __builtin_memcpy(&chunk, from + i, sizeof chunk);
            __builtin_memcpy(to + i, &chunk, sizeof chunk);
        }
        __builtin_memcpy(&chunk, from + i, sizeof chunk);
        chunk = (chunk & edge.taken) | edge.rest;
        __builtin_memcpy(to + i, &chunk, sizeof chunk);
        for (i += kChunk; i < pitch; i += kChunk) __builtin_memcpy(to + i, &edge.zeros, sizeof chunk);
    }
}

template <class Chunk>
static void pad_planes(const Int8Convolved& p) {
    constexpr int64_t kChunk = sizeof(Chunk) / sizeof(Number);
    const Edge<Chunk> edge(p.width % kChunk);
    const Number* from = static_cast<const Number*>(p.numbers);
    Number* out = static_cast<Number*>(p.padded);
    const int64_t room = p.needed - p.above, filled = p.lines < room ? p.lines : room;
    const int64_t above = p.above * p.pitch, below = (room - filled) * p.pitch;
    int64_t zeros = p.padding + above;  // to the first number of a plane
    for (int64_t plane = 0; plane < p.planes; ++plane, from += p.lines * p.width, zeros = below + above) {
        for (int64_t i = 0; i < zeros; i += kChunk) __builtin_memcpy(out + i, &edge.zeros, sizeof(Chunk));
        out += zeros;
        pad_lines(p, edge, from, filled, out);
        out += filled * p.pitch;
    }
    for (int64_t i = 0; i < below; i += kChunk) __builtin_memcpy(out + i, &edge.zeros, sizeof(Chunk));
}

// The words of a plane are those of its lines, one after the other; lines whose distance is the stride follow each other, so
// that below a word is that of the output below. Those of another `phase` of the stride are behind them, and behind all of
// these once more words for each further word of taps, unless these are among the first.
FASTKD_INLINE int64_t word_pitch(const Int8Convolved& p) { return p.pitch / p.stride[1]; }
FASTKD_INLINE int64_t plane_words(const Int8Convolved& p) { return p.needed / p.stride[0] * word_pitch(p); }
FASTKD_INLINE int64_t arrays(const Int8Convolved& p) { return kPerWord * p.dilation[1] % p.stride[1] ? p.words : 1; }
// On the right of the last line.
FASTKD_INLINE int64_t last_words(const Int8Convolved& p) { return (p.padding + p.stride[1] - 1) / p.stride[1]; }
FASTKD_INLINE int64_t phase_words(const Int8Convolved& p) { return p.planes * plane_words(p) + last_words(p) + W; }

// Words of n output pixels, or of W: of numbers from `at` on that are `dilation` apart, and from word to word `stride`.
FASTKD_INLINE vi gathered_words(const Number* at, int64_t n, int64_t stride, int64_t dilation) {
    vi words{};
    if (stride == 1) {
        for (int t = 0; t < kPerWord; ++t) {
            vn numbers;
            __builtin_memcpy(&numbers, at + t * dilation, sizeof numbers);
            words |= (widened(numbers) & kNumberMask) << (t * kNumberBits);
        }
        return words;
    }
    alignas(64) uint32_t each[W]{};
    for (int j = 0; j < (n < W ? n : W); ++j) {
        for (int t = 0; t < kPerWord; ++t) each[j] |= (at[j * stride + t * dilation] & kNumberMask) << (t * kNumberBits);
    }
    __builtin_memcpy(&words, each, sizeof words);
    return words;
}

// Where the taps of a word are close together the numbers of a few words are in one register.
class Words {
  public:
    explicit Words(const Int8Convolved& p) : stride_(p.stride[1]), dilation_(p.dilation[1]) {
#if defined(__AVX512VNNI__)
        // Four words of at most 16 bytes, which begin at a multiple of 4 of the 64.
        near_ = stride_ + dilation_ <= 5;
        const vi lane = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        const vi four = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
        const int32_t stride = near_ ? (int32_t)stride_ : 0, dilation = near_ ? (int32_t)dilation_ : 0;
        parts_ = lane + four * stride, bytes_ = lane * (stride * 0x01010101) + dilation * 0x03020100;
#else
        near_ = stride_ == 2 && dilation_ == 1;  // they are words already
#endif
    }

    // Of n output pixels.
    inline __attribute__((always_inline)) void write(const Number* at, int64_t n, int32_t* out) const {
        for (int64_t i = 0; i < n; i += W, at += W * stride_) {
            const vi words = near_ ? near_words(at) : gathered_words(at, n - i, stride_, dilation_);
            __builtin_memcpy(out + i, &words, sizeof words);
        }
    }

  private:
    inline __attribute__((always_inline)) vi near_words(const Number* at) const {
        vi numbers;
        __builtin_memcpy(&numbers, at, sizeof numbers);
#if defined(__AVX512VNNI__)
        numbers = (vi)_mm512_permutexvar_epi32((__m512i)parts_, (__m512i)numbers);
        numbers = (vi)_mm512_shuffle_epi8((__m512i)numbers, (__m512i)bytes_);
#endif
        return numbers;
    }

    int64_t stride_, dilation_;
    bool near_;
#if defined(__AVX512VNNI__)
    vi parts_, bytes_;
#endif
};

static void expand(const Int8Convolved& p) {
    const Words words(p);
    const int64_t stride = p.stride[0], pitch = word_pitch(p), last = last_words(p), lines = p.planes * p.needed;
    const Number* from = static_cast<const Number*>(p.padded);
    int32_t* out = p.expanded;
    for (int64_t array = 0; array < arrays(p); ++array, from += kPerWord * p.dilation[1]) {
        for (int64_t phase = 0; phase < stride; ++phase, out += phase_words(p)) {
            if (stride == 1) {
                words.write(from, lines * pitch + last, out);
                continue;
            }
            for (int64_t y = phase; y < lines; y += stride) {
                words.write(from + y * p.pitch, y + stride < lines ? pitch : pitch + last, out + y / stride * pitch);
            }
        }
    }
}

// The word of the first taps of those that are left in a line. Four weights can be read wherever there is one.
FASTKD_INLINE uint32_t word_of_taps(const int8_t* weight, int64_t left) {
#if defined(__AVX512VNNI__)
    uint32_t word;
    __builtin_memcpy(&word, weight, sizeof word);
    return left < 4 ? word & ((1u << left * 8) - 1) : word;
#else
    return ((uint32_t)weight[0] & 0xffff) | (left > 1 ? (uint32_t)weight[1] << 16 : 0);
#endif
}

// What sums begin with, and behind it the words of the kernel.
static void read_taps(const Int8Convolved& p, int64_t plane) {
    const int64_t lines = p.kernel[0], width = p.kernel[1];
    const int8_t* weight = p.weights + plane * lines * width;
    int32_t* out = p.taps;
    *out++ = p.starts[plane];
    for (int64_t y = 0; y < lines; ++y, weight += width) {
        for (int64_t x = 0; x < width; x += kPerWord) *out++ = (int32_t)word_of_taps(weight + x, width - x);
    }
}

// From the first word of an output pixel to those of its taps.
static void find_offsets(const Int8Convolved& p) {
    const int64_t pitch = word_pitch(p), phase = phase_words(p), apart = kPerWord * p.dilation[1];
    for (int64_t y = 0; y < p.kernel[0]; ++y) {
        const int64_t line = y * p.dilation[0], at = line % p.stride[0] * phase + line / p.stride[0] * pitch;
        for (int64_t word = 0; word < p.words; ++word) {
            const int64_t further = arrays(p) == 1 ? apart / p.stride[1] : p.stride[0] * phase;
            p.offsets[y * p.words + word] = at + word * further;
        }
    }
}

constexpr int kPlaneVectors = W == 16 ? 8 : 4;  // of sums that stay in registers

template <int vectors>
static void plane_tile(const Int8Convolved& p, const int32_t* words, int32_t* out) {
    vi sums[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sums[i] = p.taps[0] - vi{};
    const int64_t count = p.kernel[0] * p.words;
    for (int64_t tap = 0; tap < count; ++tap) {
        const vi w = p.taps[1 + tap] - vi{};
        const int32_t* from = words + p.offsets[tap];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
            vi numbers;
            __builtin_memcpy(&numbers, from + i * W, sizeof numbers);
            sums[i] = add_products(sums[i], numbers, w);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) __builtin_memcpy(out + i * W, &sums[i], sizeof(vi));
}

// As if the padded plane were a single line: what is between the lines of the output is for nothing.
static void plane_sums(const Int8Convolved& p, int64_t left, const int32_t* words, int32_t* out) {
    while (left > 0) {
        const int64_t vectors = left < kPlaneVectors ? left : kPlaneVectors;
        switch (vectors) {
            case 1: plane_tile<1>(p, words, out); break;
            case 2: plane_tile<2>(p, words, out); break;
            case 3: plane_tile<3>(p, words, out); break;
            case 4: plane_tile<4>(p, words, out); break;
#if defined(__AVX512F__)
            case 5: plane_tile<5>(p, words, out); break;
            case 6: plane_tile<6>(p, words, out); break;
            case 7: plane_tile<7>(p, words, out); break;
            case 8: plane_tile<8>(p, words, out); break;
#endif
        }
        left -= vectors, words += vectors * W, out += vectors * W;
    }
}

// To sums without gaps.
template <class Chunk>
static void close_up(const Int8Convolved& p, int64_t spread) {
    constexpr int64_t kChunk = sizeof(Chunk) / sizeof(int32_t);
    const int64_t pitch = word_pitch(p), lines = p.output[0], width = p.output[1];
    int32_t* out = p.sums;
    for (int64_t plane = 0; plane < p.planes; ++plane) {
        const int32_t* from = p.spread + plane * spread;
        for (int64_t y = 0; y < lines; ++y, from += pitch, out += width) {
            for (int64_t x = 0; x < width; x += kChunk) {
                Chunk sums;
                __builtin_memcpy(&sums, from + x, sizeof sums);
                __builtin_memcpy(out + x, &sums, sizeof sums);
            }
        }
    }
}

// Step by step for all planes: what was just written is slow to read at other addresses.
void int8_plane_products(const Int8Convolved& p) {
    typedef char Short __attribute__((vector_size(16)));
    typedef char Half __attribute__((vector_size(W == 16 ? 32 : 16)));
    typedef char Whole __attribute__((vector_size(sizeof(vi))));
    p.pitch * sizeof(Number) <= sizeof(Short) ? pad_planes<Short>(p) : pad_planes<Whole>(p);
    expand(p);
    find_offsets(p);
    const int64_t vectors = ((p.output[0] - 1) * word_pitch(p) + p.output[1] + W - 1) / W, between = plane_words(p);
    const int32_t* words = p.expanded;
    int32_t* spread = p.spread;
    for (int64_t plane = 0; plane < p.planes; ++plane, words += between, spread += vectors * W) {
        read_taps(p, plane);
        plane_sums(p, vectors, words, spread);
    }
    p.output[1] * sizeof(int32_t) <= sizeof(Half) ? close_up<Half>(p, vectors * W) : close_up<Whole>(p, vectors * W);
}

}  // namespace
}  // namespace fastkd
