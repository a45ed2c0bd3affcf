// The row pieces of standardised logits. Included by one unit for each instruction set.
#pragma once
#include "logit-inl.h"

namespace fastkd {
namespace {

// Of a tile, about its largest logit: a constant row has squares of exactly 0, and no offset costs digits.
static Moments tile_moments(const float* x, int64_t n, float pivot) {
    vf counts = splat(0.0f), sums = splat(0.0f), squares = splat(0.0f);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = load(x + i);
        const vi counted = v > kMask;
        counts += select(counted, splat(1.0f), splat(0.0f));
        sums += select(counted, v - pivot, splat(0.0f));
    }
    Moments tile;
    tile.count = sum(counts);
    const double moved = sum(sums) / tile.count;
    const float centre = static_cast<float>(moved);
    for (int64_t i = 0; i < n; i += W) {
        const vf v = load(x + i), d = select(v > kMask, v - pivot - centre, splat(0.0f));
        squares += d * d;
    }
    tile.mean = (double)pivot + moved;
    tile.squares = sum(squares);
    return tile;
}

Moments moments(const Row& row, int64_t n) {
    Tile scratch;
    Moments all;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t length = n - begin < kTile ? n - begin : kTile;
        const float* x = fetch(row, begin, length, scratch);
        float highest, lowest;
        extremes(x, length, highest, lowest);
        if (!(highest > kMask)) continue;
        if (highest > all.highest) all.highest = highest;
        const Moments tile = tile_moments(x, padded(length), highest);
        const double count = all.count + tile.count, apart = tile.mean - all.mean;
        all.squares += tile.squares + apart * apart * (all.count * tile.count / count);
        all.mean += apart * (tile.count / count);
        all.count = count;
    }
    return all;
}

template <class Divergence>
static double along_sum(const LogitRow& row, const LogitGradient& g, int32_t k) {
    Tile student_scratch, teacher_scratch;
    const Divergence piece(row.beta, g.teachers[k], g.student);
    const float omega = static_cast<float>(g.omega[k]);
    double total = 0;
    for (int64_t begin = 0; begin < row.shared; begin += kTile) {
        const int64_t n = row.shared - begin < kTile ? row.shared - begin : kTile;
        const float* s = fetch(row.student, begin, n, student_scratch);
        const float* t = fetch(row.teachers[k], begin, n, teacher_scratch);
        vf sums = splat(0.0f);
        for (int64_t i = 0; i < padded(n); i += W) {
            const vf logits = load(s + i);
            const Term term = piece(scaled(load(t + i), g.teachers[k]), scaled(logits, g.student));
            sums += piece.slope(term, omega) * centred(logits, g);
        }
        total += sum(sums);
    }
    return total;
}

static double along_sum(const LogitRow& row, const LogitGradient& g, int32_t k) {
    switch (row.divergence) {
        case Divergence::forward_kl:
        case Divergence::cross_entropy: return along_sum<ForwardKl>(row, g, k);
        case Divergence::reverse_kl: return along_sum<ReverseKl>(row, g, k);
        case Divergence::jsd: return along_sum<Jsd>(row, g, k);
        case Divergence::skew_kl: return along_sum<SkewKl>(row, g, k);
        case Divergence::skew_reverse_kl: return along_sum<SkewReverseKl>(row, g, k);
        case Divergence::tvd: return along_sum<Tvd>(row, g, k);
        case Divergence::mse: return 0;  // of raw logits
    }
    return 0;
}

double along(const LogitRow& row, const LogitGradient& g) {
    double total = 0;
    for (int32_t k = 0; k < row.teacher_count; ++k) {
        if (row.teacher_scale[k] != kSkipped) total += g.teacher_coefficient[k] * along_sum(row, g, k);
    }
    return total;
}

}  // namespace
}  // namespace fastkd
