// The row pieces of the logit losses, once, over the vectors of vec.h. Included by one unit for each instruction set.
#pragma once
#include "divergences-inl.h"
#include "tiles-inl.h"

namespace fastkd {
namespace {

FASTKD_INLINE vf scaled(vf logits, float max, float scale) { return at_least((logits - max) * scale, splat(kFloor)); }

// How far scaled logits move when a maximum rises.
FASTKD_INLINE double shift(float from, float to, float scale) { return ((double)from - (double)to) * (double)scale; }

template <Hard hard>
static void student_tile(const float* s, int64_t n, float max, float scale, double& soft_sum, double& hard_sum) {
    vf soft = splat(0.0f), other = splat(0.0f);
    for (int64_t i = 0; i < n; i += W) {
        const vf logits = load(s + i);
        const vf e = exp2(scaled(logits, max, scale));
        soft += e;
        if (hard == Hard::square) other += e * e;
        if (hard == Hard::fourth) other += (e * e) * (e * e);
        if (hard == Hard::separate) other += exp2(scaled(logits, max, kLog2e));
    }
    soft_sum = sum(soft);
    hard_sum = hard == Hard::same ? soft_sum : sum(other);
}

FASTKD_INLINE void student_tile(Hard hard, const float* s, int64_t n, float max, float scale, double& soft, double& other) {
    switch (hard) {
        case Hard::none:
        case Hard::same: return student_tile<Hard::same>(s, n, max, scale, soft, other);
        case Hard::square: return student_tile<Hard::square>(s, n, max, scale, soft, other);
        case Hard::fourth: return student_tile<Hard::fourth>(s, n, max, scale, soft, other);
        case Hard::separate: return student_tile<Hard::separate>(s, n, max, scale, soft, other);
    }
}

// The divergences whose value is linear in the teacher's unnormalised probabilities need one pass: with x the scaled logits
//   forward_kl     sum 2^x_t (x_t - x_s)
//   cross_entropy  sum 2^x_t (0 - x_s)
// (reverse_kl is linear in the student's, but its omega has to match its h to the bit: it is summed in a second pass.)
enum class Cross { none, forward_kl, cross_entropy };

FASTKD_INLINE Cross cross_of(Divergence divergence) {
    switch (divergence) {
        case Divergence::forward_kl: return Cross::forward_kl;
        case Divergence::cross_entropy: return Cross::cross_entropy;
        default: return Cross::none;
    }
}

template <Cross kind>
static void teacher_tile(const float* t, const float* s, int64_t n, float teacher_max, float teacher_scale, float max,
                         float scale, double& teacher_sum, double& cross_sum) {
    vf exponentials = splat(0.0f), cross = splat(0.0f);
    for (int64_t i = 0; i < n; i += W) {
        const vf xt = scaled(load(t + i), teacher_max, teacher_scale);
        const vf e = exp2(xt);
        exponentials += e;
        if (kind == Cross::none) continue;
        const vf xs = scaled(load(s + i), max, scale);
        if (kind == Cross::forward_kl) cross += e * (xt - xs);
        if (kind == Cross::cross_entropy) cross -= e * xs;
    }
    teacher_sum = sum(exponentials);
    cross_sum = sum(cross);
}

static void squared_tile(const float* t, const float* s, int64_t n, double& squares, double& count) {
    vf total_squares = splat(0.0f), total_count = splat(0.0f);
    for (int64_t i = 0; i < n; i += W) {
        const vf a = load(s + i), b = load(t + i);
        const vi masked = (a == -kInfinity) & (b == -kInfinity);
        const vf difference = a - b;
        total_squares += select(masked, splat(0.0f), difference * difference);
        total_count += select(masked, splat(0.0f), splat(1.0f));
    }
    squares = sum(total_squares);
    count = sum(total_count);
}

// Raises a maximum to cover the tile, and returns by how much the scaled logits move down (0 or less).
FASTKD_INLINE double raise(float& max, float highest, float scale) {
    if (!(highest > max)) return 0;
    const double moved = shift(max, highest, scale);
    max = highest;
    return moved;
}

FASTKD_INLINE void add_teacher(const LogitRow& row, int32_t k, int64_t begin, int64_t n, const float* s,
                               const StudentSums& student, double moved, TeacherSums& sums) {
    Tile scratch;
    const float* t = fetch_but(row.absent, row.teachers[k], begin, n, scratch);
    const float scale = row.teacher_scale[k];
    const Cross kind = cross_of(row.divergence);
    float highest, lowest;
    extremes(t, n, highest, lowest);
    sums.masked |= lowest == -kInfinity;
    const double teacher_moved = raise(sums.max, highest, scale);
    // When both maxima move, x_t - x_s moves by the difference, and what it is weighted with shrinks.
    const double shrink = teacher_moved == 0 ? 1 : __builtin_exp2(teacher_moved);
    if (kind == Cross::forward_kl) sums.cross = (sums.cross + (teacher_moved - moved) * sums.sum) * shrink;
    if (kind == Cross::cross_entropy) sums.cross = (sums.cross - moved * sums.sum) * shrink;
    sums.sum *= shrink;
    double tile_sum, tile_cross, count = 0;
    const int64_t whole = padded(n);
    const auto tile = kind == Cross::forward_kl      ? teacher_tile<Cross::forward_kl>
                      : kind == Cross::cross_entropy ? teacher_tile<Cross::cross_entropy>
                                                     : teacher_tile<Cross::none>;
    tile(t, s, whole, sums.max, scale, student.max, row.scale, tile_sum, tile_cross);
    if (row.divergence == Divergence::mse) squared_tile(t, s, whole, tile_cross, count);
    sums.sum += tile_sum;
    sums.cross += tile_cross;
    sums.count += count;
}

// The sums of one more tile of the shared ids; returns by how much the scaled logits moved, and the tile's largest.
FASTKD_INLINE double add_student(const LogitRow& row, const float* s, int64_t n, StudentSums& student, float& highest) {
    float lowest;
    extremes(s, n, highest, lowest);
    student.masked |= lowest == -kInfinity;
    const float before = student.max;
    const double moved = raise(student.max, highest, row.scale);
    if (moved != 0) {
        student.sum *= __builtin_exp2(moved);
        student.hard_sum *= __builtin_exp2(shift(before, student.max, kLog2e));
    }
    double soft_sum = 0, hard_sum = 0;
    student_tile(row.hard, s, padded(n), student.max, row.scale, soft_sum, hard_sum);
    student.sum += soft_sum;
    student.hard_sum += hard_sum;
    return moved;
}

// The hard sums, after those of the ids below `shared`, of the others.
FASTKD_INLINE void add_beyond(const LogitRow& row, int64_t shared, StudentSums& student) {
    Tile scratch;
    student.hard_max = student.max;
    if (row.hard == Hard::none) return;
    for (int64_t begin = shared; begin < row.vocabulary; begin += kTile) {
        const int64_t n = row.vocabulary - begin < kTile ? row.vocabulary - begin : kTile;
        const float* s = fetch(row.student, begin, n, scratch);
        float highest, lowest;
        extremes(s, n, highest, lowest);
        const double moved = raise(student.hard_max, highest, kLog2e);
        double soft_sum = 0, hard_sum = 0;
        student_tile<Hard::same>(s, padded(n), student.hard_max, kLog2e, soft_sum, hard_sum);
        student.hard_sum = student.hard_sum * (moved == 0 ? 1 : __builtin_exp2(moved)) + hard_sum;
        if (row.total) student.total += total(s, n, highest);
    }
}

void statistics(const LogitRow& row, StudentSums& student, TeacherSums* teachers) {
    Tile scratch;
    const int64_t shared = row.soft ? row.shared : 0;
    for (int64_t begin = 0; begin < shared; begin += kTile) {
        const int64_t n = shared - begin < kTile ? shared - begin : kTile;
        const float* s = fetch_but(row.absent, row.student, begin, n, scratch);
        float highest;
        const double moved = add_student(row, s, n, student, highest);
        if (row.total) student.total += total(s, n, highest);
        for (int32_t k = 0; k < row.teacher_count; ++k) {
            if (row.teacher_scale[k] != kSkipped) add_teacher(row, k, begin, n, s, student, moved, teachers[k]);
        }
    }
    add_beyond(row, shared, student);
}

FASTKD_INLINE vf scaled(vf logits, const Normaliser& side) { return scaled(logits, side.max, side.scale); }

template <class Divergence>
static void divergence_sums(const LogitRow& row, int32_t k, const Normaliser& student, const Normaliser& teacher,
                            double* value, double* omega) {
    Tile student_scratch, teacher_scratch;
    const Divergence piece(row.beta, teacher, student);
    double value_sum = 0, slope_sum = 0, mass = 0;
    for (int64_t begin = 0; begin < row.shared; begin += kTile) {
        const int64_t n = row.shared - begin < kTile ? row.shared - begin : kTile;
        const float* s = fetch(row.student, begin, n, student_scratch);
        const float* t = fetch(row.teachers[k], begin, n, teacher_scratch);
        vf values = splat(0.0f), slopes = splat(0.0f), masses = splat(0.0f);
        for (int64_t i = 0; i < padded(n); i += W) {
            const Term term = piece(scaled(load(t + i), teacher), scaled(load(s + i), student));
            values += term.v;
            slopes += term.q * term.h;
            masses += term.q;
        }
        value_sum += sum(values);
        slope_sum += sum(slopes);
        mass += sum(masses);
    }
    *value = value_sum;
    *omega = slope_sum / mass;
}

void divergence(const LogitRow& row, int32_t k, const Normaliser& student, const Normaliser& teacher, double* value, double* omega) {
    switch (row.divergence) {
        case Divergence::reverse_kl: return divergence_sums<ReverseKl>(row, k, student, teacher, value, omega);
        case Divergence::jsd: return divergence_sums<Jsd>(row, k, student, teacher, value, omega);
        case Divergence::skew_kl: return divergence_sums<SkewKl>(row, k, student, teacher, value, omega);
        case Divergence::skew_reverse_kl: return divergence_sums<SkewReverseKl>(row, k, student, teacher, value, omega);
        case Divergence::tvd: return divergence_sums<Tvd>(row, k, student, teacher, value, omega);
        default: return;  // the others come out of `statistics`
    }
}

// Adds the hard term where it is a power of q, or no function of it at all.
template <Hard hard>
FASTKD_INLINE vf add_hard(const LogitGradient& g, vf logits, vf q, vf grad) {
    if (hard == Hard::square) grad += g.power_coefficient * (q * q);
    if (hard == Hard::fourth) grad += g.power_coefficient * ((q * q) * (q * q));
    if (hard == Hard::separate) grad += g.hard_coefficient * exp2(scaled(logits, g.hard));
    return grad;
}

// out = coefficient * q (h - omega), and in the pass of the first teacher the hard term.
template <class Divergence, Hard hard>
static void gradient_tile(const LogitRow& row, const LogitGradient& g, int32_t k, bool first, const float* s, const float* t,
                          int64_t n, float* out) {
    const Normaliser student = g.student, teacher = g.teachers[k];
    const Divergence piece(row.beta, teacher, student);
    const float coefficient = g.teacher_coefficient[k], omega = static_cast<float>(g.omega[k]);
    for (int64_t i = 0; i < n; i += W) {
        const vf logits = load(s + i);
        const Term term = piece(scaled(load(t + i), teacher), scaled(logits, student));
        const vf q = term.q;
        vf grad = coefficient * piece.slope(term, omega);
        if (first) {
            grad += g.student_coefficient * q + g.constant;
            grad = add_hard<hard>(g, logits, q, grad);
        } else {
            grad += load(out + i);
        }
        store(out + i, grad);
    }
}

template <class Divergence>
static void gradient_tile(const LogitRow& row, const LogitGradient& g, int32_t k, bool first, const float* s, const float* t,
                          int64_t n, float* out) {
    switch (first ? row.hard : Hard::none) {
        case Hard::none:
        case Hard::same: return gradient_tile<Divergence, Hard::none>(row, g, k, first, s, t, n, out);
        case Hard::square: return gradient_tile<Divergence, Hard::square>(row, g, k, first, s, t, n, out);
        case Hard::fourth: return gradient_tile<Divergence, Hard::fourth>(row, g, k, first, s, t, n, out);
        case Hard::separate: return gradient_tile<Divergence, Hard::separate>(row, g, k, first, s, t, n, out);
    }
}

static void mse_gradient_tile(float coefficient, bool first, float constant, const float* s, const float* t, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += W) {
        const vf a = load(s + i), b = load(t + i);
        const vi masked = (a == -kInfinity) & (b == -kInfinity);
        const vf grad = coefficient * select(masked, splat(0.0f), a - b);
        store(out + i, grad + (first ? splat(constant) : load(out + i)));
    }
}

// The hard term alone: ids that are not shared, mse, and rows without a soft term.
static void hard_gradient_tile(const LogitGradient& g, bool add, const float* s, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += W) {
        const vf q = exp2(scaled(load(s + i), g.hard));
        store(out + i, g.hard_coefficient * q + (add ? load(out + i) : splat(g.constant)));
    }
}

static void teacher_gradient(const LogitRow& row, const LogitGradient& g, int32_t k, bool first, const float* s, const float* t,
                             int64_t n, float* out) {
    switch (row.divergence) {
        case Divergence::forward_kl:
        case Divergence::cross_entropy: return gradient_tile<ForwardKl>(row, g, k, first, s, t, n, out);
        case Divergence::reverse_kl: return gradient_tile<ReverseKl>(row, g, k, first, s, t, n, out);
        case Divergence::jsd: return gradient_tile<Jsd>(row, g, k, first, s, t, n, out);
        case Divergence::skew_kl: return gradient_tile<SkewKl>(row, g, k, first, s, t, n, out);
        case Divergence::skew_reverse_kl: return gradient_tile<SkewReverseKl>(row, g, k, first, s, t, n, out);
        case Divergence::tvd: return gradient_tile<Tvd>(row, g, k, first, s, t, n, out);
        case Divergence::mse: return mse_gradient_tile(g.teacher_coefficient[k], first, g.constant, s, t, n, out);
    }
}

constexpr float kMask = -1e30f;  // a logit this low is a mask, as -inf is

// s_j - mean, and 0 for a mask.
FASTKD_INLINE vf centred(vf logits, const LogitGradient& g) {
    return select(logits > kMask, logits - g.student.max + g.lift, splat(0.0f));
}

void gradient(const LogitRow& row, const LogitGradient& g, void* grad) {
    Tile student_scratch, teacher_scratch, out;
    const int64_t shared = row.soft ? row.shared : 0;
    for (int64_t begin = 0; begin < row.vocabulary;) {
        const bool soft = begin < shared;
        const int64_t end = soft ? shared : row.vocabulary;
        const int64_t n = end - begin < kTile ? end - begin : kTile, whole = padded(n);
        const float* s = fetch_but(soft ? row.absent : -1, row.student, begin, n, student_scratch);
        bool first = true;
        for (int32_t k = 0; soft && k < row.teacher_count; ++k) {
            if (row.teacher_scale[k] == kSkipped) continue;
            const float* t = fetch_but(row.absent, row.teachers[k], begin, n, teacher_scratch);
            teacher_gradient(row, g, k, first, s, t, whole, out.data);
            first = false;
        }
        // A soft tile has its hard term already, unless mse (which has no q) or no teacher was there to bring it.
        const bool brought = !first && row.divergence != Divergence::mse;
        if (row.hard != Hard::none && !brought) {
            hard_gradient_tile(g, !first, s, whole, out.data);
        } else if (first) {
            for (int64_t i = 0; i < whole; i += W) store(out.data + i, splat(0.0f));
        }
        for (int64_t i = 0; soft && g.along != 0 && i < whole; i += W) {
            store(out.data + i, load(out.data + i) + g.along * centred(load(s + i), g));
        }
        if (g.label >= begin && g.label < begin + n) out.data[g.label - begin] += g.label_coefficient;
        write(grad, row.student.dtype, begin, out.data, n);
        begin += n;
    }
}

bool unmatched(const Row& absent, const Row& present, int64_t n, int64_t but) {
    Tile absent_scratch, present_scratch;
    vi found{};
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t length = n - begin < kTile ? n - begin : kTile;
        const float* a = fetch_but(but, absent, begin, length, absent_scratch);
        const float* b = fetch_but(but, present, begin, length, present_scratch);
        for (int64_t i = 0; i < padded(length); i += W) found |= (load(a + i) == -kInfinity) & (load(b + i) != -kInfinity);
    }
    for (int i = 0; i < W; ++i) {
        if (found[i]) return true;
    }
    return false;
}

int64_t best(const Row& row, int64_t n) {
    Tile scratch;
    float best_value = -kInfinity;
    int64_t best_tile = 0;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t length = n - begin < kTile ? n - begin : kTile;
        float highest, lowest;
        extremes(fetch(row, begin, length, scratch), length, highest, lowest);
        if (highest > best_value) best_value = highest, best_tile = begin;
    }
    const int64_t length = n - best_tile < kTile ? n - best_tile : kTile;
    const float* x = fetch(row, best_tile, length, scratch);
    for (int64_t i = 0; i < length; ++i) {
        if (x[i] == best_value) return best_tile + i;
    }
    return 0;
}

}  // namespace
}  // namespace fastkd
