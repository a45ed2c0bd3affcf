"""Each divergence as two functions of one id: its value v and W = q dv/dq, from log2 p and log2 q.

With D = sum v and omega = sum W, dD/ds_j = (W_j - omega q_j) / T. A multiple of q may be added to W: it cancels.
Every piece returns ``v, W, q``, in nats. Where both probabilities are 0 all three are 0, and a NaN stays a NaN.

``v`` is needed only where a divergence takes a pass of its own (``TWO_PASS``): jsd, skew and tvd depend on both
normalisers in a way that no running sum can correct later. The others form their value while the normalisers are
still growing, see ``statistics.py``; here only their W matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LN2, clip, log2

TWO_PASS = ("jsd", "skew_kl", "skew_reverse_kl", "tvd")


@triton.jit
def forward_kl(lp, lq, beta, rest):
    """v = p log(p/q), W = -p. The same W serves the cross-entropy of p and q."""
    p, q = tl.exp2(lp), tl.exp2(lq)
    return p * (clip(lp) - clip(lq)) * LN2, -p, q


@triton.jit
def reverse_kl(lp, lq, beta, rest):
    """v = W = q log(q/p)."""
    q = tl.exp2(lq)
    v = q * (clip(lq) - clip(lp)) * LN2
    return v, v, q


@triton.jit
def mixture(lp, lq, of_p, of_q):
    """Terms of m = of_p p + of_q q, with weights that sum to 1, without cancellation, overflow or a NaN at p = q = 0.

    Everything is relative to the larger of p and q: with e = smaller / larger, m / larger = u = (weights) . (1, e),
    which is at most 1 and exactly 1 at p = q. Returns whether p is the larger, larger, e, u, and
    larger log2(m / larger), smaller log2(m / smaller).
    """
    lq = clip(lq)
    d = lp - lq
    gap = tl.minimum(tl.abs(d), 300.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(-gap)
    larger = tl.exp2(tl.maximum(lp, lq, propagate_nan=tl.PropagateNan.ALL))
    p_leads = d > 0
    u = tl.fma(tl.where(p_leads, of_q, of_p), e, tl.where(p_leads, of_p, of_q))
    g = log2(u)
    return p_leads, larger, e, u, larger * g, larger * e * (gap + g)


@triton.jit
def jsd(lp, lq, beta, rest):
    """m = beta p + rest q: v = beta p log(p/m) + rest q log(q/m), W = rest q log(q/m)."""
    p_leads, larger, e, _, of_larger, of_smaller = mixture(lp, lq, beta, rest)
    v = tl.where(p_leads, rest, beta) * of_smaller + tl.where(p_leads, beta, rest) * of_larger
    w = tl.where(p_leads, of_smaller, of_larger)
    return v * -LN2, w * (rest * -LN2), tl.where(p_leads, larger * e, larger)


@triton.jit
def skew_kl(lp, lq, beta, rest):
    """m = beta p + rest q: v = p log(p/m), W = -rest q (p/m - 1), where |p/m - 1| = rest (1 - e) / u."""
    p_leads, larger, e, u, of_larger, of_smaller = mixture(lp, lq, beta, rest)
    q = tl.where(p_leads, larger * e, larger)
    v = tl.where(p_leads, of_larger, of_smaller) * -LN2
    off = (1 - e) * tl.exp2(-log2(u)) * (rest * rest)
    return v, q * tl.where(p_leads, -off, off), q


@triton.jit
def skew_reverse_kl(lp, lq, beta, rest):
    """m = beta q + rest p: v = q log(q/m), W = v - beta q (q/m - 1), where |q/m - 1| = rest (1 - e) / u."""
    p_leads, larger, e, u, of_larger, of_smaller = mixture(lp, lq, rest, beta)
    q = tl.where(p_leads, larger * e, larger)
    v = tl.where(p_leads, of_smaller, of_larger) * -LN2
    off = (1 - e) * tl.exp2(-log2(u)) * (beta * rest)
    return v, tl.fma(q, tl.where(p_leads, off, -off), v), q


@triton.jit
def tvd(lp, lq, beta, rest):
    """v = |p - q| / 2, W = q sign(q - p) / 2."""
    p, q = tl.exp2(lp), tl.exp2(lq)
    d = q - p
    return tl.abs(d) * 0.5, tl.where(d > 0, 0.5 * q, tl.where(d < 0, -0.5 * q, d)), q


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
