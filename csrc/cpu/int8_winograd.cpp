#include "int8_winograd.h"

#include <vector>

#include "int8_images.h"
#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kBatch = 36;  // tiles at a time: no weight is read for few, and what becomes of them stays near
constexpr int64_t kRun = 8;     // tiles side by side, whose outputs are finished together
constexpr int64_t kPixels = kRun * kWinogradTile;
constexpr int64_t kMostVector = 32;  // numbers that are transformed together

struct alignas(64) Stage {
    int32_t sums[kWinogradTile][kPixels * kMostColumns];
    int32_t turned[kPixels * kMostColumns];
};

// The outputs of images, tile by tile; the last of each line and column may have fewer each way.
class Tiles {
  public:
    explicit Tiles(const Int8Images& i) : height(i.output_size(0, i.height)), width(i.output_size(1, i.width)) {}

    struct Tile {
        int64_t image, y, x;  // of the first output
        int down, across;     // outputs
    };

    int64_t across() const { return tiles_of(width); }
    int64_t of_image() const { return tiles_of(height) * across(); }
    // Of all tiles of an image.
    int64_t positions() const { return (height + 2 * tiles_of(height)) * (width + 2 * across()); }

    Tile operator[](int64_t i) const {
        const int64_t y = i % of_image() / across() * kWinogradTile, x = i % across() * kWinogradTile;
        return {i / of_image(), y, x, outputs(height - y), outputs(width - x)};
    }

    const int64_t height, width;  // of the output

  private:
    static int64_t tiles_of(int64_t pixels) { return (pixels + kWinogradTile - 1) / kWinogradTile; }
    static int outputs(int64_t left) { return static_cast<int>(std::min<int64_t>(left, kWinogradTile)); }
};

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

// Rows of a batch: whole tiles first, then those that are narrower, those that are lower, and those that are both. A point may
// be part of tall tiles only, of wide ones only, of those that are both, or of all.
class Order {
  public:
    void sort(const Tiles& t, int64_t begin, int64_t end, int64_t most) {
        int64_t counts[4]{}, next[4]{};
        for (int64_t i = begin; i < end; ++i) ++counts[kind_of(t[i])];
        for (int kind = 1; kind < 4; ++kind) next[kind] = next[kind - 1] + counts[kind - 1];
        const int64_t narrower = next[1], lower = next[2], both = next[3];
        rows_.clear();
        for (int64_t i = begin; i < end; ++i) rows_.push_back(next[kind_of(t[i])]++);
        for (auto& of_tall : pieces_) {
            for (std::vector<Piece>& pieces : of_tall) pieces.clear();
        }
        cut(pieces_[false][false], 0, end - begin, most);
        cut(pieces_[true][false], 0, lower, most);
        cut(pieces_[false][true], 0, narrower, most);
        cut(pieces_[false][true], lower, both, most);
        cut(pieces_[true][true], 0, narrower, most);
    }

    // Some rows that follow each other: as many as the registers hold sums of, at most.
    struct Piece {
        int64_t first;
        int rows;
    };
    const std::vector<Piece>& pieces(bool tall, bool wide) const { return pieces_[tall][wide]; }
    int64_t row(int64_t i) const { return rows_[i]; }

  private:
    static int kind_of(const Tiles::Tile& t) { return 2 * (t.down < kWinogradTile) + (t.across < kWinogradTile); }

    // As alike as can be.
    static void cut(std::vector<Piece>& pieces, int64_t begin, int64_t end, int64_t most) {
        const int64_t count = end - begin, number = (count + most - 1) / most;
        for (int64_t i = 0; i < number; ++i) {
            const int64_t first = i * count / number;
            pieces.push_back({begin + first, static_cast<int>((i + 1) * count / number - first)});
        }
    }

    std::vector<int64_t> rows_;
    std::vector<Piece> pieces_[2][2];
};

class Batch {
  public:
    Batch(const QuantisedImages& q, const Tiles& t, const Packing& p, const WinogradPacking& w, const char* packed,
          const Int8Epilogue& e, int64_t count)
        : q_(q), t_(t), p_(p), w_(w), packed_(packed), e_(e), kernels_(active_instruction_set().int8),
          row_bytes_(odd_lines((p.shape.terms + kMostVector - 1) / kMostVector * kMostVector * sizeof(int16_t))),
          position_bytes_(odd_lines(count * row_bytes_)),
          position_sums_(odd_lines(count * std::min<int64_t>(p.panels, p.layout.panels) * p.layout.lanes * 4) / 4),
          numbers_(kWinogradPositions * position_bytes_), sums_(kWinogradPositions * position_sums_ * sizeof(int32_t)),
          stage_(sizeof(Stage)) {}

    // Tiles from `begin` to `end`, and blocks of columns from `first` to `last`.
    void compute(int64_t begin, int64_t end, int64_t first, int64_t last) {
        order_.sort(t_, begin, end, p_.layout.rows_of(static_cast<int>(w_.panels(0))));
        for (int64_t i = begin; i < end; ++i) transform(t_[i], numbers_.data() + order_.row(i - begin) * row_bytes_);
        for (int64_t block = first; block < last; ++block) {
            multiply(block);
            for (int64_t i = begin; i < end;) {
                const int64_t left = t_.across() - i % t_.across(), run = std::min({left, end - i, kRun});
                finish(block, i, i - begin, run);
                i += run;
            }
        }
    }

  private:
    int32_t* sums() const { return reinterpret_cast<int32_t*>(sums_.data()); }
    int64_t pitch(int64_t block) const { return w_.panels(block) * p_.layout.lanes; }

    void transform(const Tiles::Tile& t, char* out) {
        const char* numbers = q_.numbers.data() + t.image * q_.image_bytes + t.y * q_.line_bytes + t.x * q_.pixel_bytes;
        const int64_t channels = p_.shape.terms;
        kernels_.winograd_numbers({t.down, t.across, numbers, q_.line_bytes, q_.pixel_bytes, channels, out, position_bytes_});
    }

    void multiply(int64_t block) {
        const int panels = static_cast<int>(w_.panels(block));
        const Run run{0, w_.words};
        Int8Rows a{{}, &run, 1, w_.words, nullptr, nullptr};
        for (int position = 0; position < kWinogradPositions; ++position) {
            const bool tall = !has_winograd_point(lowest_, position / kWinogradPoints);
            const bool wide = !has_winograd_point(narrowest_, position % kWinogradPoints);
            const char *weights = packed_ + w_.offset(block, position), *numbers = numbers_.data() + position * position_bytes_;
            a.ahead = weights + panels * w_.panel_bytes;  // the next position's
            for (const Order::Piece& piece : order_.pieces(tall, wide)) {
                for (int r = 0; r < piece.rows; ++r) a.at[r] = numbers + (piece.first + r) * row_bytes_;
                int32_t* to = sums() + position * position_sums_ + piece.first * pitch(block);
                kernels_.winograd_products(a, piece.rows, panels, weights, to);
                a.ahead += w_.words * kLine;
            }
        }
    }

    // Tiles side by side, of which the first is number `at` of the batch.
    void finish(int64_t block, int64_t first, int64_t at, int64_t count) {
        const int64_t pitch = this->pitch(block);
        const Tiles::Tile from = t_[first], to = t_[first + count - 1];
        Int8Lines l = lines(block, from, 0, to.x + to.across);
        if (finishes_at_once(l, pitch)) {
            for (int64_t i = 0; i < count; ++i) {
                const Tiles::Tile t = t_[first + i];
                kernels_.winograd_sums({t.down, t.across, sums() + order_.row(at + i) * pitch, position_sums_, pitch, nullptr,
                                        t_.width * l.output_stride, 0, &l});
                l.output = static_cast<float*>(l.output) + kWinogradTile * l.output_stride;
            }
            return;
        }
        Stage& stage = *reinterpret_cast<Stage*>(stage_.data());
        for (int64_t i = 0; i < count; ++i) {
            const Tiles::Tile t = t_[first + i];
            kernels_.winograd_sums({t.down, t.across, sums() + order_.row(at + i) * pitch, position_sums_, pitch,
                                    stage.sums[0] + i * kWinogradTile * pitch, kPixels * kMostColumns, pitch, nullptr});
        }
        for (int y = 0; y < from.down; ++y) {
            l = lines(block, from, y, to.x + to.across);
            l.sums = stage.sums[y], l.pitch = pitch;
            if (e_.planes) {
                kernels_.transpose(stage.sums[y], to.x + to.across - from.x, pitch, stage.turned, kPixels);
                l.sums = stage.turned, l.pitch = kPixels;
            }
            kernels_.finish(l);
        }
    }

    // Of a line of outputs, from those of a tile to `end`.
    Int8Lines lines(int64_t block, const Tiles::Tile& from, int y, int64_t end) const {
        const int64_t channel = p_.first_panel(block) * p_.layout.lanes, line = (from.y + y) * t_.width;
        return e_.lines(from.image, t_.height * t_.width, p_.shape.channels, line + from.x, line + end, channel,
                        std::min(pitch(block), p_.columns - channel));
    }

    const QuantisedImages& q_;
    const Tiles& t_;
    const Packing& p_;
    const WinogradPacking& w_;
    const char* packed_;
    const Int8Epilogue& e_;
    const Int8Kernels& kernels_;
    const int lowest_ = t_[t_.of_image() - 1].down, narrowest_ = t_[t_.of_image() - 1].across;
    const int64_t row_bytes_, position_bytes_, position_sums_;
    const Scratch numbers_, sums_, stage_;
    Order order_;
};

// What it costs, measured, in products of bytes, of which those of 16 bits take two: the transforms of a channel of a tile,
// and a byte of weights that is read from another cache than a core's own, or from farther away.
constexpr double kTransforms = 1250, kReadNear = 3, kRead = 7;
constexpr int64_t kNear = 1 << 20, kFar = 8 << 20;
constexpr int64_t kFewest = 6;  // tiles: with fewer, weights are what is waited for
constexpr double kWorth = 1.1;

bool is_possible(const Int8Images& i, const Packing& p) {
    for (int axis = 0; axis < 2; ++axis) {
        if (i.kernel[axis] != 3 || i.stride[axis] != 1 || i.dilation[axis] != 1) return false;
    }
    return p.shape.groups == 1 && !p.depthwise && p.parts == 1;
}

}  // namespace

bool int8_winograd_pays(const Int8Images& i, const Packing& p, int threads) {
    if (!is_possible(i, p)) return false;
    const Tiles t(i);
    const int64_t tiles = i.count * t.of_image(), weights = p.shape.terms * p.shape.channels, bytes = 8 * 9 * weights;
    if (tiles * weights == 0) return false;
    const double products = static_cast<double>(weights) * i.count;
    const double direct = products * 9 * t.height * t.width * (p.four ? 1 : 2);  // elsewhere these have 16 bits too
    const double transforms = kTransforms * (p.shape.terms + p.shape.channels) * tiles;
    const double reading = (bytes < kNear ? 0 : bytes < kFar ? kReadNear : kRead) * bytes * split(tiles, p, threads).batches;
    const double filtered = 2 * std::max<double>(products * t.positions(), weights * kWinogradPositions * kFewest);
    return direct > kWorth * (filtered + transforms + reading);
}

void int8_winograd(const Int8Layer& l, const Int8Images& i, const Packing& p) {
    const Tiles tiles(i);
    const int64_t size = p.shape.channels * tiles.height * tiles.width * element_size(l.dtype);
    if (i.count * size == 0) return;
    prefer_huge_pages(l.output, i.count * size);
    const WinogradPacking w(p);
    QuantisedImages q(l, i, p);
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
            after_stores_past_caches();
        });
    }
}

}  // namespace fastkd
