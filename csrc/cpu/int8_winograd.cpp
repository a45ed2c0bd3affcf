#include "int8_winograd.h"

#include "int8_images.h"
#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kBatch = 36;  // tiles at a time: what becomes of them is still in a cache of the core when it is read, and no weight is read for few
constexpr int64_t kRun = 8;       // tiles side by side, whose outputs are finished together
// What it costs, measured, in products of two bytes, of which the other way has one for each tap: the transforms of a channel
// of a tile, and a byte of weights that comes from another core's or the last cache, or from memory.
constexpr double kTransforms = 1250, kReadNear = 3, kRead = 7, kNear = 1 << 20, kFar = 8 << 20;
constexpr double kWorth = 1.1;
constexpr int64_t kFewest = 6;  // tiles: fewer take as long, for then weights are what is waited for
constexpr int64_t kPixels = kRun * kWinogradTile;

struct alignas(64) Stage {
    int32_t sums[kWinogradTile][kPixels * kMostColumns];
    int32_t turned[kPixels * kMostColumns];
};

int64_t tiles_of(int64_t pixels) { return (pixels + kWinogradTile - 1) / kWinogradTile; }

// Batches of as many tiles, and parts of all columns, so that each thread has one: of few tiles each takes all for some of
// the columns rather than to read all weights for fewer still.
struct Split {
    int64_t batches, parts;
};

Split split(int64_t tiles, const Packing& p, int threads) {
    const int64_t fewest = (tiles + kBatch - 1) / kBatch;
    const int64_t parts = std::min<int64_t>(p.blocks, (threads + fewest - 1) / fewest), shares = (threads + parts - 1) / parts;
    return {std::min(tiles, (fewest + shares - 1) / shares * shares), parts};
}

// Tiles of some images, one after the other.
struct Tiles {
    int64_t height, width;  // of the output
    int64_t down, across;
    int64_t of_image() const { return down * across; }
};

class Batch {
  public:
    Batch(const QuantisedImages& q, const Tiles& t, const Packing& p, const WinogradPacking& w, const char* packed,
          const Int8Epilogue& e, int64_t count)
        : q_(q), t_(t), p_(p), w_(w), packed_(packed), e_(e), kernels_(active_instruction_set().int8),
          row_bytes_(odd_lines((p.shape.terms + kMostVector - 1) / kMostVector * kMostVector * 2)), position_bytes_(odd_lines(count * row_bytes_)),
          position_sums_(odd_lines(count * std::min<int64_t>(p.panels, p.layout.panels) * p.layout.lanes * 4) / 4),
          numbers_(kWinogradPositions * position_bytes_), sums_(kWinogradPositions * position_sums_ * sizeof(int32_t)),
          stage_(sizeof(Stage)) {}

    // Tiles from `begin` to `end`, and blocks of columns from `first` to `last`.
    void compute(int64_t begin, int64_t end, int64_t first, int64_t last) {
        for (int64_t tile = begin; tile < end; ++tile) transform(tile, numbers_.data() + (tile - begin) * row_bytes_);
        for (int64_t block = first; block < last; ++block) {
            multiply(block, end - begin);
            for (int64_t tile = begin; tile < end;) {
                const int64_t left = t_.across - tile % t_.across, run = std::min({left, end - tile, kRun});
                finish(block, tile, run, sums() + (tile - begin) * pitch(block));
                tile += run;
            }
        }
    }

  private:
    static constexpr int64_t kMostVector = 32;  // numbers that are transformed together

    int32_t* sums() const { return reinterpret_cast<int32_t*>(sums_.data()); }
    int64_t pitch(int64_t block) const { return w_.panels(block) * p_.layout.lanes; }

    void transform(int64_t tile, char* out) {
        const int64_t image = tile / t_.of_image(), y = tile % t_.of_image() / t_.across, x = tile % t_.across;
        const char* numbers = q_.numbers.data() + image * q_.image_bytes;
        kernels_.winograd_numbers(numbers + kWinogradTile * (y * q_.line_bytes + x * q_.pixel_bytes), q_.line_bytes,
                                  q_.pixel_bytes, p_.shape.terms, out, position_bytes_);
    }

    // Of all positions, the same rows at a time: as many as the registers hold, and as alike as can be.
    void multiply(int64_t block, int64_t count) {
        const int panels = static_cast<int>(w_.panels(block));
        const int64_t most = p_.layout.rows_of(panels), calls = (count + most - 1) / most, pitch = this->pitch(block);
        rows_.resize(calls);
        for (int64_t c = 0; c < calls; ++c) rows_[c] = static_cast<int>((c + 1) * count / calls - c * count / calls);
        const Run run{0, w_.words};
        Int8Rows a{{}, &run, 1, w_.words, nullptr, kLine, nullptr};
        for (int64_t position = 0; position < kWinogradPositions; ++position) {
            const char *weights = packed_ + w_.offset(block, position), *numbers = numbers_.data() + position * position_bytes_;
            int32_t* sums = this->sums() + position * position_sums_;
            a.ahead = weights + panels * w_.panel_bytes;  // the next position's
            for (const int rows : rows_) {
                for (int r = 0; r < rows; ++r, numbers += row_bytes_) a.at[r] = numbers;
                kernels_.winograd_products(a, rows, panels, weights, sums);
                sums += rows * pitch, a.ahead += w_.words * kLine;
            }
        }
    }

    void finish(int64_t block, int64_t tile, int64_t count, const int32_t* sums) {
        Stage& stage = *reinterpret_cast<Stage*>(stage_.data());
        const int64_t pitch = this->pitch(block), first = p_.first_panel(block) * p_.layout.lanes;
        const int64_t image = tile / t_.of_image(), top = tile % t_.of_image() / t_.across * kWinogradTile;
        const int64_t begin = tile % t_.across * kWinogradTile, end = std::min(begin + count * kWinogradTile, t_.width);
        for (int64_t i = 0; i < count; ++i) {
            kernels_.winograd_sums(sums + i * pitch, position_sums_, pitch, stage.sums[0] + i * kWinogradTile * pitch,
                                   kPixels * kMostColumns, pitch);
        }
        for (int64_t y = 0; y < std::min<int64_t>(kWinogradTile, t_.height - top); ++y) {
            const int64_t line = (top + y) * t_.width;
            Int8Lines l = e_.lines(image, t_.height * t_.width, p_.shape.channels, line + begin, line + end, first,
                                   std::min(pitch, p_.columns - first));
            l.sums = stage.sums[y], l.pitch = pitch;
            if (e_.planes) {
                kernels_.transpose(stage.sums[y], end - begin, pitch, stage.turned, kPixels);
                l.sums = stage.turned, l.pitch = kPixels;
            }
            kernels_.finish(l);
        }
    }

    const QuantisedImages& q_;
    const Tiles& t_;
    const Packing& p_;
    const WinogradPacking& w_;
    const char* packed_;
    const Int8Epilogue& e_;
    const Int8Kernels& kernels_;
    const int64_t row_bytes_, position_bytes_, position_sums_;
    const Scratch numbers_, sums_, stage_;
    std::vector<int> rows_;
};

}  // namespace

bool int8_winograd_pays(const Int8Images& i, const Packing& p, int threads) {
    for (int axis = 0; axis < 2; ++axis) {
        if (i.kernel[axis] != 3 || i.stride[axis] != 1 || i.dilation[axis] != 1) return false;
    }
    if (p.shape.groups != 1 || p.depthwise || p.parts > 1) return false;
    const int64_t height = i.output_size(0, i.height), width = i.output_size(1, i.width);
    const int64_t tiles = i.count * tiles_of(height) * tiles_of(width);
    if (tiles == 0 || p.shape.channels == 0) return false;
    const double weights = static_cast<double>(p.shape.terms) * p.shape.channels, bytes = 8.0 * 9 * weights;
    const double direct = 9 * weights * i.count * height * width * (p.four ? 1 : 2);
    const double read = bytes < kNear ? 0 : bytes < kFar ? kReadNear : kRead;
    const double products = 2 * kWinogradPositions * weights * std::max(tiles, kFewest);
    const double transforms = kTransforms * (p.shape.terms + p.shape.channels) * tiles;
    return direct > kWorth * (products + transforms + read * bytes * split(tiles, p, threads).batches);
}

void int8_winograd(const Int8Layer& l, const Int8Images& i, const Packing& p) {
    const int64_t height = i.output_size(0, i.height), width = i.output_size(1, i.width);
    const int64_t size = p.shape.channels * height * width * element_size(l.dtype);
    if (i.count * size == 0) return;
    prefer_huge_pages(l.output, i.count * size);
    const Tiles tiles{height, width, tiles_of(height), tiles_of(width)};
    const WinogradPacking w(p);
    QuantisedImages q(l, i, p, {tiles.down * kWinogradTile - height, tiles.across * kWinogradTile - width});
    for (int64_t first = 0; first < i.count; first += q.room) {
        const int64_t images = std::min(q.room, i.count - first), count = images * tiles.of_image();
        q.fill(first, images);
        const Int8Epilogue epilogue = epilogue_of_images(l, i, p, first, q.steps.data());
        const Split s = split(count, p, l.threads);
        in_chunks(s.batches * s.parts, 1, l.threads, [&](int64_t begin, int64_t end) {
            Batch batch(q, tiles, p, w, l.packed, epilogue, (count + s.batches - 1) / s.batches);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t b = item / s.parts, part = item % s.parts;
                batch.compute(b * count / s.batches, (b + 1) * count / s.batches, part * p.blocks / s.parts,
                              (part + 1) * p.blocks / s.parts);
            }
#if defined(__x86_64__)
            __builtin_ia32_sfence();  // or another thread might not see what went past the caches
#endif
        });
    }
}

}  // namespace fastkd
