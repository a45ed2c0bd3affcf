#include "int8_multiply.h"

#include <fstream>

#include "int8_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kStrip = 64;  // pixels: about as many as columns, so that neither side is read much more often
constexpr int64_t kNear = 1 << 20;  // bytes of a core's own cache
constexpr int64_t kCost = 128;  // products that are as dear as one id of a row of logits (threads.h)
constexpr int64_t kStream = 8;  // rows that could be computed while a block of weights is read
constexpr int64_t kAhead = 24;  // rows: with fewer products, weights come no sooner for being asked for
constexpr int64_t kItems = 8;   // for each thread, so that all are busy to the end

// What a strip of pixels and a block of columns become, until it is written. Whole panels and, transposed, whole vectors.
struct alignas(64) Stage {
    union {
        int32_t sums[kStrip * kMostColumns];
        float floats[kStrip * kMostColumns];
    };
    int32_t turned[kStrip * kMostColumns];
};

// For layers without a bias: what is added changes nothing, not even the sign of a zero.
struct NoBias {
    float zeros[kMostColumns];
    constexpr NoBias() : zeros() {
        for (float& zero : zeros) zero = -0.0f;
    }
};
constexpr NoBias kNoBias;

// 0 where nobody knows. (glibc's sysconf takes all that an AMD package has for what one core can use.)
int64_t last_cache_bytes() {
    int64_t kilobytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;
    return kilobytes << 10;
}

class Strip {
  public:
    Strip(const Int8Grid& g, const Packing& p, const char* packed, const Int8Epilogue& e)
        : g_(g), p_(p), packed_(packed), e_(e), kernels_(active_instruction_set().int8) {}

    // Weights that come after these, and are read from far away while there are products to be made.
    void expect(const char* weights, int64_t bytes) { ahead_ = weights, ahead_end_ = weights + bytes; }

    void compute(int64_t image, int64_t begin, int64_t end, int64_t group, int64_t block) {
        const int panels = static_cast<int>(p_.first_panel(block + 1) - p_.first_panel(block));
        const int64_t pitch = panels * p_.layout.lanes, first = p_.first_panel(block) * p_.layout.lanes;
        const char* numbers = g_.numbers + image * g_.image_stride + group * g_.group_stride;
        if (g_.kind == Int8Grid::depthwise) numbers += first * kernels_.layout.bytes();
        Int8Lines l = lines(image, begin, end, group * p_.columns + first, std::min(pitch, p_.columns - first), pitch);
        if (g_.kind == Int8Grid::words && p_.parts == 1 && finishes_at_once(l, pitch)) {
            multiply(numbers, begin, end, g_.runs[0], panels, p_.words_of(0), packed_ + p_.offset(group, 0, block), pitch, &l);
            return;
        }
        for (int64_t part = 0; part < p_.parts; ++part) {
            const char* weights = packed_ + p_.offset(group, part, block);
            multiply(numbers, begin, end, g_.runs[part], panels, p_.words_of(part), weights, pitch, nullptr);
            if (p_.parts > 1) add_part(part, (end - begin) * pitch);
        }
        if (e_.planes) kernels_.transpose(stage_.sums, end - begin, pitch, stage_.turned, kStrip);
        kernels_.finish(l);
    }

  private:
    void multiply(const char* numbers, int64_t begin, int64_t end, const std::vector<Run>& runs, int panels, int64_t words,
                  const char* weights, int64_t pitch, Int8Lines* at_once) {
        const char* line = numbers + begin / g_.width * g_.line_stride;
        int64_t x = begin % g_.width, left = end - begin;
        const int64_t most = left > p_.layout.rows ? p_.layout.rows_of(panels) : p_.layout.rows;
        Int8Rows a{{}, runs.data(), static_cast<int64_t>(runs.size()), words, nullptr, at_once};
        const int64_t tiles = (left + most - 1) / most, least = left / tiles, larger = left % tiles;  // as alike as can be
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int rows = static_cast<int>(least + (tile < larger));
            for (int r = 0; r < rows; ++r) {
                a.at[r] = line + x * g_.pixel_stride;
                if (++x == g_.width) x = 0, line += g_.line_stride;
            }
            a.ahead = weights;  // if there is nothing more to fetch, what is here already
            if (ahead_ < ahead_end_) a.ahead = ahead_, ahead_ += words * kLine;
            products(a, rows, panels, weights, (end - begin - left) * pitch);
            if (at_once) advance(*at_once, rows);
            left -= rows;
        }
    }

    static void advance(Int8Lines& l, int rows) {
        l.steps += rows * l.steps_stride;
        l.output = static_cast<float*>(l.output) + rows * l.output_stride;
    }

    void products(const Int8Rows& a, int rows, int panels, const char* weights, int64_t at) {
        switch (g_.kind) {
            case Int8Grid::words: return kernels_.products(a, rows, panels, weights, stage_.sums + at);
            case Int8Grid::floats: return kernels_.float_products(a, rows, panels, weights, stage_.floats + at);
            case Int8Grid::depthwise: return kernels_.depthwise_products(a, rows, panels, weights, stage_.sums + at);
        }
    }

    // Sums of several parts need more than 32 bits; a double holds integers of 53. The last part leaves floats.
    void add_part(int64_t part, int64_t count) {
        if (part == 0) wide_.assign(count, 0);
        if (g_.kind == Int8Grid::floats) {
            for (int64_t i = 0; i < count; ++i) wide_[i] += stage_.floats[i];
        } else {
            for (int64_t i = 0; i < count; ++i) wide_[i] += stage_.sums[i];
        }
        if (part + 1 == p_.parts) std::copy(wide_.begin(), wide_.end(), stage_.floats);
    }

    // Where the sums go, and how.
    Int8Lines lines(int64_t image, int64_t begin, int64_t end, int64_t channel, int64_t columns, int64_t pitch) const {
        Int8Lines l = e_.lines(image, g_.height * g_.width, p_.shape.channels, begin, end, channel, columns);
        l.floats = g_.kind == Int8Grid::floats || p_.parts > 1;
        l.sums = e_.planes ? stage_.turned : stage_.sums, l.pitch = e_.planes ? kStrip : pitch;
        return l;
    }

    const Int8Grid& g_;
    const Packing& p_;
    const char* packed_;
    const Int8Epilogue& e_;
    const Int8Kernels& kernels_;
    const char *ahead_ = nullptr, *ahead_end_ = nullptr;
    Stage stage_;
    std::vector<double> wide_;
};

}  // namespace

std::vector<std::vector<Run>> parts_of(const std::vector<Run>& taps, const Packing& p, int64_t word_bytes) {
    std::vector<std::vector<Run>> parts(1);
    int64_t room = p.part_words;
    for (const Run& tap : taps) {
        for (int64_t word = 0; word < tap.words;) {
            if (room == 0) parts.emplace_back(), room = p.part_words;
            std::vector<Run>& runs = parts.back();
            const int64_t words = std::min(tap.words - word, room), offset = tap.offset + word_bytes * word;
            if (!runs.empty() && runs.back().offset + word_bytes * runs.back().words == offset) {
                runs.back().words += words;  // the next tap's numbers follow in memory
            } else {
                runs.push_back({offset, words});
            }
            word += words, room -= words;
        }
    }
    return parts;
}

bool finishes_at_once(Int8Lines& l, int64_t pitch) {
    const bool simple = l.activation == Activation::none || l.activation == Activation::relu;
    if (l.channels_are_lines || l.columns != pitch || l.dtype != Dtype::float32 || l.residual || !simple) return false;
    if (!l.bias) l.bias = kNoBias.zeros;
    return true;
}

Int8Lines Int8Epilogue::lines(int64_t image, int64_t pixels, int64_t channels, int64_t begin, int64_t end, int64_t channel,
                              int64_t columns) const {
    Int8Lines l;
    l.sums = nullptr, l.floats = false, l.pitch = 0;
    l.lines = end - begin, l.columns = columns, l.channels_are_lines = planes;
    l.scale = scale + channel, l.bias = bias ? bias + channel : nullptr;
    l.steps = step_by_pixel ? steps + begin : steps + image, l.steps_stride = step_by_pixel;
    l.residual_stride = residual_stride, l.output_stride = output_stride;
    l.dtype = dtype, l.activation = activation, l.stores = stores;
    int64_t from = (image * pixels + begin) * output_stride + channel;
    int64_t added = (image * pixels + begin) * residual_stride + channel;
    if (planes) {
        std::swap(l.lines, l.columns);
        from = added = (image * channels + channel) * pixels + begin;
    }
    const int64_t size = element_size(dtype);
    l.output = static_cast<char*>(output) + from * size;
    l.residual = residual ? static_cast<const char*>(residual) + added * size : nullptr;
    return l;
}

Int8Epilogue epilogue_of_rows(const Int8Layer& l, const Int8Matrix& m, const Packing& p, int64_t first, const float* steps,
                              bool step_by_pixel) {
    const int64_t size = element_size(l.dtype), columns = p.shape.channels;
    const char* residual = static_cast<const char*>(l.residual);
    return {l.scale, l.bias, steps, step_by_pixel, residual ? residual + first * m.residual_stride * size : nullptr,
            static_cast<char*>(l.output) + first * columns * size, m.residual_stride, columns, false, l.dtype, l.activation,
            stores_of(l.output, m.rows * columns * size, columns * size, l.threads)};
}

Stores stores_of(const void* output, int64_t bytes, int64_t row_bytes, int threads) {
    static const int64_t last = last_cache_bytes();
    const bool aligned = reinterpret_cast<uintptr_t>(output) % kLine == 0 && row_bytes % kLine == 0;
    if (aligned && last > 0 && bytes >= last / 4 * 3) return Stores::past_caches;
    return bytes >= (threads > 1 ? threads * kNear : kNear / 4) ? Stores::fetched : Stores::near;
}

void int8_multiply(const Int8Grid& g, const Packing& p, const char* packed, const Int8Epilogue& e, int threads) {
    const int64_t pixels = g.height * g.width, strips = (pixels + kStrip - 1) / kStrip, count = g.images * strips;
    const int64_t blocks = p.shape.groups * p.blocks;
    if (count * blocks == 0) return;
    // So many strips take a block of weights in turn: as many as stay near beside this block and the next, and where there are
    // enough of them only such as the same thread has quantised (Shares).
    const int64_t columns = std::min<int64_t>(p.columns, kMostColumns), block_bytes = p.bytes() / blocks;
    const int64_t near = (kNear - 2 * block_bytes) / std::max<int64_t>(1, std::min(pixels, kStrip) * g.pixel_stride);
    const int64_t fair = threads > 1 ? std::min(count * blocks / (kItems * threads), count / threads) : count;
    const int64_t depth = std::max<int64_t>(1, std::min({near, fair, count}));
    const int64_t items = (count + depth - 1) / depth * blocks;
    const int64_t products = p.words * p.layout.group * columns * (depth * std::min(pixels, kStrip) + kStream);
    const int64_t chunk = std::max(least_chunk(products / kCost), items / (kItems * threads));
    in_chunks(items, chunk, threads, [&](int64_t begin, int64_t end) {
        Strip strip(g, p, packed, e);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t group = i % blocks / p.blocks, block = i % p.blocks;
            const int64_t item = i + 1, next = item % blocks;  // most often this thread's too
            if (item < items && blocks > 1 && p.parts == 1 && depth * std::min(pixels, kStrip) >= kAhead) {
                strip.expect(packed + p.offset(next / p.blocks, 0, next % p.blocks), block_bytes);
            }
            for (int64_t s = i / blocks * depth; s < std::min(count, (i / blocks + 1) * depth); ++s) {
                const int64_t first = s % strips * kStrip;
                strip.compute(s / strips, first, std::min(pixels, first + kStrip), group, block);
            }
        }
        after_stores_past_caches();
    });
}

}  // namespace fastkd
