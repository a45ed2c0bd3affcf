// The row pieces of a teacher that names k ids a row, on the tiles of the logit losses. Included by one unit for each
// instruction set.
//
// The named ids are taken out of the tiles and follow as tiles of their own. So the tail is summed by itself, and has all
// its digits where the named ids leave it next to nothing.
#include "logit-inl.h"
#include "topk.h"

namespace fastkd {
namespace {

static_assert(kTile % kBlock == 0, "a tile is a number of blocks");

struct Entries {
    const int32_t *begin, *end;
};

// Those with an id in [begin, begin + n), where `begin` begins a tile.
FASTKD_INLINE Entries entries(const NamedIds& named, int64_t begin, int64_t n) {
    return {named.order + named.first[begin / kBlock], named.order + named.first[(begin + n + kBlock - 1) / kBlock]};
}

// The logits of n entries, as floats, padded to whole vectors with -inf.
FASTKD_INLINE const float* fetch_named(const Row& row, const int64_t* ids, int64_t n, Tile& scratch) {
    if (row.dtype == Dtype::float32) {
        const float* source = static_cast<const float*>(row.data);
        for (int64_t e = 0; e < n; ++e) scratch.data[e] = ids[e] < 0 ? -kInfinity : source[ids[e]];
        for (int64_t e = n; e < padded(n); ++e) scratch.data[e] = -kInfinity;
        return scratch.data;
    }
    uint16_t halves[kTile];
    const uint16_t* source = static_cast<const uint16_t*>(row.data);
    const uint16_t lowest = row.dtype == Dtype::bfloat16 ? 0xff80 : 0xfc00;  // -inf
    for (int64_t e = 0; e < n; ++e) halves[e] = ids[e] < 0 ? lowest : source[ids[e]];
    return fetch({halves, row.dtype}, 0, n, scratch);
}

// A tile without the named ids: -inf is probability 0.
FASTKD_INLINE const float* without(const NamedIds& named, int64_t begin, int64_t n, const float* s, Tile& scratch) {
    const Entries mine = entries(named, begin, n);
    if (mine.begin == mine.end) return s;
    // Where it was read in place n is whole vectors. `rounded`: not a call of memcpy, which takes four times as long.
    if (s != scratch.data) {
        for (int64_t i = 0; i < n; i += W) store(scratch.data + i, rounded(load(s + i)));
    }
    for (const int32_t* e = mine.begin; e < mine.end; ++e) scratch.data[named.ids[*e] - begin] = -kInfinity;
    return scratch.data;
}

void topk_statistics(const LogitRow& row, const NamedIds& named, StudentSums& tail, StudentSums& student) {
    Tile scratch;
    float highest, lowest;
    for (int64_t begin = 0; begin < row.shared; begin += kTile) {
        const int64_t n = row.shared - begin < kTile ? row.shared - begin : kTile;
        const float* s = fetch(row.student, begin, n, scratch);
        if (row.total) {
            extremes(s, n, highest, lowest);
            student.total += total(s, n, highest);
        }
        add_student(row, without(named, begin, n, s, scratch), n, student, highest);
    }
    tail = student;
    for (int64_t begin = 0; begin < named.count; begin += kTile) {
        const int64_t n = named.count - begin < kTile ? named.count - begin : kTile;
        const float* s = fetch_named(row.student, named.ids + begin, n, scratch);
        __builtin_memcpy(named.values + begin, s, n * sizeof(float));
        add_student(row, s, n, student, highest);
    }
    add_beyond(row, row.shared, student);
}

template <Hard hard>
static void spread_tile(float spread, const LogitGradient& g, const float* s, int64_t n, float* out) {
    const float coefficient = spread + g.student_coefficient;
    for (int64_t i = 0; i < n; i += W) {
        const vf logits = load(s + i), q = exp2(scaled(logits, g.student));
        store(out + i, add_hard<hard>(g, logits, q, coefficient * q + g.constant));
    }
}

static void spread_tile(Hard hard, float spread, const LogitGradient& g, const float* s, int64_t n, float* out) {
    switch (hard) {
        case Hard::none:
        case Hard::same: return spread_tile<Hard::none>(spread, g, s, n, out);
        case Hard::square: return spread_tile<Hard::square>(spread, g, s, n, out);
        case Hard::fourth: return spread_tile<Hard::fourth>(spread, g, s, n, out);
        case Hard::separate: return spread_tile<Hard::separate>(spread, g, s, n, out);
    }
}

// What the named ids get, in the gradient's dtype, before the first logit is overwritten.
FASTKD_INLINE void finish_named(const LogitRow& row, const NamedIds& named, const LogitGradient& g) {
    Tile scratch, out;
    for (int64_t begin = 0; begin < named.count && row.hard != Hard::none; begin += kTile) {
        const int64_t n = named.count - begin < kTile ? named.count - begin : kTile;
        const float* s = fetch_named(row.student, named.ids + begin, n, scratch);
        hard_gradient_tile(g, false, s, padded(n), out.data);
        for (int64_t e = 0; e < n; ++e) {
            named.values[begin + e] += out.data[e] + (named.ids[begin + e] == g.label ? g.label_coefficient : 0);
        }
    }
    // In place: a half ends before the float that it came from.
    if (row.student.dtype != Dtype::float32) write(named.values, row.student.dtype, 0, named.values, named.count);
}

template <class Storage>
FASTKD_INLINE void place_named(const NamedIds& named, void* grad) {
    for (int64_t e = 0; e < named.count; ++e) {
        const int64_t id = named.ids[e];
        const char* value = reinterpret_cast<const char*>(named.values) + e * sizeof(Storage);
        if (id >= 0) __builtin_memcpy(static_cast<Storage*>(grad) + id, value, sizeof(Storage));
    }
}

void topk_gradient(const LogitRow& row, const NamedIds& named, float spread, const LogitGradient& g, void* grad) {
    Tile scratch, out;
    const int64_t shared = row.soft ? row.shared : 0;
    finish_named(row, named, g);
    for (int64_t begin = 0; begin < row.vocabulary;) {
        const int64_t end = begin < shared ? shared : row.vocabulary;
        const int64_t n = end - begin < kTile ? end - begin : kTile, whole = padded(n);
        const float* s = fetch(row.student, begin, n, scratch);
        if (begin < shared && spread != 0) {
            spread_tile(row.hard, spread, g, s, whole, out.data);
        } else if (row.hard != Hard::none) {
            hard_gradient_tile(g, false, s, whole, out.data);
        } else {
            for (int64_t i = 0; i < whole; i += W) store(out.data + i, splat(0.0f));
        }
        if (g.label >= begin && g.label < begin + n) out.data[g.label - begin] += g.label_coefficient;
        write(grad, row.student.dtype, begin, out.data, n);
        begin += n;
    }
    // Over what the tiles gave them: the row is still in the second-level cache.
    if (row.student.dtype == Dtype::float32) {
        place_named<float>(named, grad);
    } else {
        place_named<uint16_t>(named, grad);
    }
}

}  // namespace
}  // namespace fastkd
