// A divergence is one piece: from log2 p_j and log2 q_j, the value v_j (natural logarithms), W_j = q_j dv_j/dq_j up to a
// multiple of q_j, and q_j. The derivations are in fastkd/reference/logit.py.
#include "vec.h"

namespace fastkd {
namespace {

struct Term {
    vf v, w, q;
};

struct ForwardKl {
    explicit ForwardKl(float) {}
    Term operator()(vf lp, vf lq) const {
        const vf p = exp2(lp);
        return {p * (lp - lq) * kLn2, -p, exp2(lq)};
    }
};

struct ReverseKl {
    explicit ReverseKl(float) {}
    Term operator()(vf lp, vf lq) const {
        const vf q = exp2(lq), v = q * (lq - lp) * kLn2;
        return {v, v, q};
    }
};

struct Tvd {
    explicit Tvd(float) {}
    Term operator()(vf lp, vf lq) const {
        const vf p = exp2(lp), q = exp2(lq), difference = q - p;
        const vf half = select(difference > 0.0f, splat(0.5f), select(difference < 0.0f, splat(-0.5f), difference));
        return {0.5f * abs(difference), q * half, q};
    }
};

// p and q against m = share p + (1 - share) q. Only the ratio of the smaller probability to the larger is exponentiated,
// so nothing overflows, and log(m / larger) = log(1 + weight (ratio - 1)) has no cancellation where p and q are close.
struct Mixture {
    vf p, q;
    vf log_p_over_m, log_q_over_m;    // natural
    vf one_minus_p_over_m, one_minus_q_over_m;

    Mixture(vf lp, vf lq, float share) {
        const vf d = lp - lq, distance = at_most(abs(d), splat(300.0f));
        const vi p_smaller = d <= 0.0f;
        vf ratio, ratio_minus_1;
        exp2_and_m1(-distance, ratio, ratio_minus_1);
        const vf larger = exp2(select(p_smaller, lq, lp)), smaller = larger * ratio;
        const vf weight = select(p_smaller, splat(share), splat(1.0f - share));
        const vf z = weight * ratio_minus_1;  // m / larger - 1
        const vf log_m = log1p_natural(z), inverse = 1.0f / (1.0f + z);
        const vf log_smaller = -(distance * kLn2 + log_m);
        const vf from_larger = z * inverse, from_smaller = (z - ratio_minus_1) * inverse;
        p = select(p_smaller, smaller, larger);
        q = select(p_smaller, larger, smaller);
        log_p_over_m = select(p_smaller, log_smaller, -log_m);
        log_q_over_m = select(p_smaller, -log_m, log_smaller);
        one_minus_p_over_m = select(p_smaller, from_smaller, from_larger);
        one_minus_q_over_m = select(p_smaller, from_larger, from_smaller);
    }
};

struct Jsd {
    float beta;
    explicit Jsd(float beta) : beta(beta) {}
    Term operator()(vf lp, vf lq) const {
        const Mixture m(lp, lq, beta);
        const vf w = (1.0f - beta) * m.q * m.log_q_over_m;
        return {beta * m.p * m.log_p_over_m + w, w, m.q};
    }
};

struct SkewKl {
    float beta;
    explicit SkewKl(float beta) : beta(beta) {}
    Term operator()(vf lp, vf lq) const {
        const Mixture m(lp, lq, beta);
        return {m.p * m.log_p_over_m, (1.0f - beta) * m.q * m.one_minus_p_over_m, m.q};
    }
};

struct SkewReverseKl {
    float beta;
    explicit SkewReverseKl(float beta) : beta(beta) {}
    Term operator()(vf lp, vf lq) const {
        const Mixture m(lp, lq, 1.0f - beta);
        return {m.q * m.log_q_over_m, m.q * (m.log_q_over_m + beta * m.one_minus_q_over_m), m.q};
    }
};

}  // namespace
}  // namespace fastkd
