"""Each divergence as two functions of one id, its value v and h = dD/dq up to a constant, from log2 p and log2 q.

With D = sum v and omega = sum q h / sum q, dD/ds_j = q_j (h_j - omega) / T. Every piece returns ``v, h, q``, in nats.
Where both probabilities are 0 all slopes are 0, and a NaN stays a NaN.

A slope is what a subtraction leaves: it vanishes where one id has all of q, and where h is the same for all ids that
have some. In floats too, if the kernel that sums and the one that subtracts have the same bits of h: hence ``times``.

``v`` is needed only where a divergence takes a pass of its own (``TWO_PASS``): jsd, skew and tvd depend on both
normalisers in a way that no running sum can correct later, and reverse_kl's omega has to match its h. The others form
their value while the normalisers are still growing, see ``statistics.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LN2, clip, log2, times

TWO_PASS = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")


@triton.jit
def forward_kl(lp, lq, beta, rest):
    """v = p log(p/q). h = -p / q would overflow: -p stands in its place, and the slope is q - p. So for -p log q."""
    p, q = tl.exp2(lp), tl.exp2(lq)
    return p * (clip(lp) - clip(lq)) * LN2, -p, q


@triton.jit
def reverse_kl(lp, lq, beta, rest):
    """v = q log(q/p), h = log(q/p). Infinite where the logits say that p is 0 and q is not, if only just."""
    q = tl.exp2(lq)
    h = times(clip(lq) - clip(lp), LN2)
    return tl.where((lp == -float("inf")) & (lq > -float("inf")), float("inf"), q * h), h, q


@triton.jit
def mixture(lp, lq, of_p, of_q):
    """Terms of m = of_p p + of_q q, with weights that sum to 1, without cancellation, overflow or a NaN at p = q = 0.

    Everything is relative to the larger of p and q: with e = smaller / larger, m / larger = u = (weights) . (1, e),
    which is at most 1 and exactly 1 at p = q. Returns whether p is the larger, larger, e, u, and log2(m / larger),
    log2(m / smaller).
    """
    lq = clip(lq)
    d = lp - lq
    gap = tl.minimum(tl.abs(d), 300.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(-gap)
    larger = tl.exp2(tl.maximum(lp, lq, propagate_nan=tl.PropagateNan.ALL))
    p_leads = d > 0
    u = tl.fma(tl.where(p_leads, of_q, of_p), e, tl.where(p_leads, of_p, of_q))
    g = log2(u)
    return p_leads, larger, e, u, g, gap + g


@triton.jit
def jsd(lp, lq, beta, rest):
    """m = beta p + rest q: v = beta p log(p/m) + rest q log(q/m), h = rest log(q/m)."""
    p_leads, larger, e, _, of_larger, of_smaller = mixture(lp, lq, beta, rest)
    v = tl.where(p_leads, rest, beta) * e * of_smaller + tl.where(p_leads, beta, rest) * of_larger
    h = times(tl.where(p_leads, of_smaller, of_larger), -LN2 * rest)
    return v * larger * -LN2, h, tl.where(p_leads, larger * e, larger)


@triton.jit
def skew_kl(lp, lq, beta, rest):
    """m = beta p + rest q: v = p log(p/m), h = -rest (p/m - 1), where |p/m - 1| = rest (1 - e) / u."""
    p_leads, larger, e, u, of_larger, of_smaller = mixture(lp, lq, beta, rest)
    v = tl.where(p_leads, larger * of_larger, larger * e * of_smaller) * -LN2
    off = times((1 - e) * tl.exp2(-log2(u)), rest * rest)
    return v, tl.where(p_leads, -off, off), tl.where(p_leads, larger * e, larger)


@triton.jit
def skew_reverse_kl(lp, lq, beta, rest):
    """m = beta q + rest p: v = q log(q/m), h = log(q/m) - beta (q/m - 1), where |q/m - 1| = rest (1 - e) / u."""
    p_leads, larger, e, u, of_larger, of_smaller = mixture(lp, lq, rest, beta)
    q = tl.where(p_leads, larger * e, larger)
    log_ratio = times(tl.where(p_leads, of_smaller, of_larger), -LN2)
    off = times((1 - e) * tl.exp2(-log2(u)), beta * rest)
    return q * log_ratio, log_ratio + tl.where(p_leads, off, -off), q


@triton.jit
def tvd(lp, lq, beta, rest):
    """v = |p - q| / 2, h = sign(q - p) / 2."""
    p, q = tl.exp2(lp), tl.exp2(lq)
    d = q - p
    return tl.abs(d) * 0.5, tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, d)), q


TERMS = {
    "forward_kl": forward_kl,
    "cross_entropy": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "mse": forward_kl,
}
