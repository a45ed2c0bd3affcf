// A divergence is one piece: from the scaled logits x_t and x_s (see Normaliser) the value v_j in nats, h_j = dD/dq_j up to
// a constant, and q_j. The derivations are in fastkd/reference/logit.py, which writes W_j for q_j h_j.
//
// A slope q_j (h_j - omega) with omega = sum q h / sum q is what a subtraction leaves: it vanishes where one id has all of
// q, or where h is the same for all ids that have some. In floats too, if h is rounded to the same bits in the pass that
// sums and in the pass that subtracts, and if omega is divided by the sum of the very q that it was summed with.
#pragma once
#include "vec.h"

namespace fastkd {
namespace {

struct Term {
    vf v, h, q;
};

struct Piece {
    float beta, rest;                    // 1 - beta, which a subtraction in floats would not give where beta is near 0 or 1
    bool lopsided;                       // one of the two is next to nothing
    float inverse_t, inverse_s, offset;  // offset: log2 of the teacher's sum over the student's

    Piece(double beta, const Normaliser& teacher, const Normaliser& student)
        : beta(static_cast<float>(beta)),
          rest(static_cast<float>(1 - beta)),
          lopsided(beta < 0.0625 || beta > 0.9375),
          inverse_t(teacher.inverse_sum),
          inverse_s(student.inverse_sum),
          offset(static_cast<float>(teacher.log_sum - student.log_sum)) {}

    static vf slope(const Term& term, float omega) { return term.q * (term.h - omega); }
};

// h = -p / q overflows where q is small, so that -p stands in its place, and the slope is q - p.
struct ForwardKl : Piece {
    using Piece::Piece;
    Term operator()(vf xt, vf xs) const {
        const vf p = exp2(xt) * inverse_t;
        return {p * (xt - xs - offset) * kLn2, -p, exp2(xs) * inverse_s};
    }
    static vf slope(const Term& term, float) { return term.q + term.h; }
};

struct ReverseKl : Piece {
    using Piece::Piece;
    Term operator()(vf xt, vf xs) const {
        const vf q = exp2(xs) * inverse_s, h = rounded((xs - xt + offset) * kLn2);
        return {q * h, h, q};
    }
};

struct Tvd : Piece {
    using Piece::Piece;
    Term operator()(vf xt, vf xs) const {
        const vf p = exp2(xt) * inverse_t, q = exp2(xs) * inverse_s, difference = q - p;
        const vf half = select(difference > 0.0f, splat(0.5f), select(difference < 0.0f, splat(-0.5f), difference));
        return {0.5f * abs(difference), half, q};
    }
};

// p and q against m = of_p p + of_q q, weights that sum to 1. Only the ratio r of the smaller probability to the larger is
// exponentiated, so nothing overflows. With w, w' the weights of the larger and the smaller,
//   m / larger = w + w' r = 1 - w' (1 - r)    m / smaller = 1 + w (1 - r) / r
// and the logarithm of one gives that of the other, which differs by the gap between p and q. From m / larger, the other is
// a difference that loses 1 / w of its digits: where w is small and m / smaller near 1, it is taken directly.
struct Mixture {
    vf p, q;
    vf log_p_over_m, log_q_over_m;    // natural
    vf one_minus_p_over_m, one_minus_q_over_m;

    Mixture(const Piece& piece, vf xt, vf xs, float of_p, float of_q) {
        const vf d = xt - xs - piece.offset, distance = at_most(abs(d), splat(300.0f));
        const vi p_smaller = d <= 0.0f;
        vf ratio, ratio_minus_1;
        exp2_and_m1(-distance, ratio, ratio_minus_1);
        const vf inverse_larger = select(p_smaller, splat(piece.inverse_s), splat(piece.inverse_t));
        const vf larger = exp2(select(p_smaller, xs, xt)) * inverse_larger, smaller = larger * ratio;
        const vf of_larger = select(p_smaller, splat(of_q), splat(of_p));
        const vf of_smaller = select(p_smaller, splat(of_p), splat(of_q));
        const vf over_larger = of_larger + of_smaller * ratio, below = of_smaller * ratio_minus_1;
        const vf gap = distance * kLn2;
        vf log_m = log_natural(over_larger, below), log_smaller = -(gap + log_m);
        if (piece.lopsided) {
            const vf above = of_larger * ratio_minus_1 / -ratio;
            const vi near = (of_larger <= 0.5f) & (above < 0.41f);
            const vf logarithm = log_natural(above + 1.0f, above);
            log_m = select(near, logarithm - gap, log_m);
            log_smaller = select(near, -logarithm, log_smaller);
        }
        const vf inverse = 1.0f / over_larger;
        const vf from_larger = below * inverse, from_smaller = -of_larger * ratio_minus_1 * inverse;
        p = select(p_smaller, smaller, larger);
        q = select(p_smaller, larger, smaller);
        log_p_over_m = select(p_smaller, log_smaller, -log_m);
        log_q_over_m = select(p_smaller, -log_m, log_smaller);
        one_minus_p_over_m = select(p_smaller, from_smaller, from_larger);
        one_minus_q_over_m = select(p_smaller, from_larger, from_smaller);
    }
};

struct Jsd : Piece {
    using Piece::Piece;
    Term operator()(vf xt, vf xs) const {
        const Mixture m(*this, xt, xs, beta, rest);
        const vf h = rounded(rest * m.log_q_over_m);
        return {beta * m.p * m.log_p_over_m + m.q * h, h, m.q};
    }
};

struct SkewKl : Piece {
    using Piece::Piece;
    Term operator()(vf xt, vf xs) const {
        const Mixture m(*this, xt, xs, beta, rest);
        return {m.p * m.log_p_over_m, rounded(rest * m.one_minus_p_over_m), m.q};
    }
};

struct SkewReverseKl : Piece {
    using Piece::Piece;
    Term operator()(vf xt, vf xs) const {
        const Mixture m(*this, xt, xs, rest, beta);
        vf h = m.log_q_over_m + rounded(beta * m.one_minus_q_over_m);
        if (lopsided) {  // with a = q / m - 1 near 0 that is log(1 + a) - a + rest a, all of second order: by its series
            const vf a = -m.one_minus_q_over_m;
            vf series = splat(1.0f / 7.0f);
            series = series * a - 1.0f / 6.0f;
            series = series * a + 1.0f / 5.0f;
            series = series * a - 1.0f / 4.0f;
            series = series * a + 1.0f / 3.0f;
            series = series * a - 1.0f / 2.0f;
            h = select(abs(a) < 0.0625f, a * a * series + rest * a, h);
        }
        return {m.q * m.log_q_over_m, rounded(h), m.q};
    }
};

}  // namespace
}  // namespace fastkd
