# ruff: noqa: RUF005, SIM108 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""Row statistics: maxima, sums of exponentials and the value of every divergence that one pass can give.

A program keeps one running maximum per thread, and nothing crosses threads before the end of its range. When a maximum
rises by ``m' - m``, its sums shrink by ``2**d``, ``d = (m - m') c`` with ``c = log2(e) / T``. The same rule merges the
threads of a program, the parts of a row, and (for whoever keeps partial rows) chunks and shards of a vocabulary.

With xs = (s - ms) cs and xt = (t - mt) ct the one-pass divergences are, in bits,

    forward_kl     A / Zt - log2(Zt / Zs)      A = sum 2**xt (xt - xs)
    cross_entropy  A / Zt + log2(Zs)           A = sum 2**xt (-xs)

and A moves with the maxima: each term is its weight times a difference that shifts by dt - ds. Both exponents are
relative to maxima, so that a teacher that differs from the student by a constant loses no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LN2, LOG2E, LOWEST, NOWHERE, clip, offsets


@triton.jit
def no_student(R: tl.constexpr):
    """max, sum at T, sum at 1, sum of s - pivot, first id at the max."""
    zero = tl.zeros([R], tl.float32)
    return zero + LOWEST, zero, zero, zero, tl.full([R], NOWHERE, tl.int32)


@triton.jit
def no_teachers(TEACHERS: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr):
    """For each: max, sum, A (or a sum of squares), extent (or a count of ids), first id at the max.

    ``extent`` is the teacher's largest logit where the student is at -inf: above -inf, the divergence is infinite,
    whatever the probability underflows to.
    """
    zero = tl.zeros([R], tl.float32)
    extent = zero if KIND == "mse" else zero - float("inf")
    teachers = ()
    for _ in tl.static_range(TEACHERS):
        teachers = teachers + ((zero + LOWEST, zero, zero, extent, tl.full([R], NOWHERE, tl.int32)),)
    return teachers


@triton.jit
def raised(m, tiles):
    for u in tl.static_range(len(tiles)):
        m = tl.maximum(m, tl.max(tiles[u], axis=1))
    return m


@triton.jit
def first_at(best, m, top, tiles, i, R: tl.constexpr, K: tl.constexpr):
    """The first id that holds the maximum, which was m and is now top. Ties keep the smaller id."""
    seen = tl.full([R], NOWHERE, tl.int32)
    for u in tl.static_range(len(tiles)):
        at = tl.where(tiles[u] == top[:, None], i + u * R * K + offsets(R, K), NOWHERE)
        seen = tl.minimum(seen, tl.min(at, axis=1))
    return tl.where(top > m, seen, tl.minimum(best, seen))


@triton.jit
def moved(a, zt, ds, dt, KIND: tl.constexpr):
    """A after the maxima moved; ds and dt are clipped, so that an empty sum times a large move is 0."""
    if KIND == "forward_kl":
        a = (a + (dt - ds) * zt) * tl.exp2(dt)
    elif KIND == "cross_entropy":
        a = (a - ds * zt) * tl.exp2(dt)
    return a


@triton.jit
def summed(total, tiles, pivot, i, first, last, R: tl.constexpr, K: tl.constexpr, EDGE: tl.constexpr):
    """The sum of s - pivot with one step more. ``pivot`` keeps the digits of a sum of logits far from zero."""
    for u in tl.static_range(len(tiles)):
        beyond = tiles[u] - pivot
        if EDGE:
            at = i + offsets(R, K)
            beyond = tl.where((at >= first) & (at < last), beyond, 0.0)
        total += tl.sum(beyond, axis=1)
    return total


@triton.jit
def see_student(
    student, tiles, c, pivot, i, first, last,
    R: tl.constexpr, K: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One step of the student's running numbers."""
    m, z, z1, total, best = student
    top = raised(m, tiles)
    if SOFT:
        z *= tl.exp2((m - top) * c)
    if HARD:
        z1 *= tl.exp2((m - top) * LOG2E)
    for u in tl.static_range(len(tiles)):
        below = tiles[u] - top[:, None]
        if SOFT:
            z += tl.sum(tl.exp2(below * c), axis=1)
        if HARD:
            z1 += tl.sum(tl.exp2(below * LOG2E), axis=1)
    if SMOOTH:
        total = summed(total, tiles, pivot, i, first, last, R, K, EDGE)
    if AGREE:
        best = first_at(best, m, top, tiles, i, R, K)
    return top, z, z1, total, best


@triton.jit
def see_teacher(
    teacher, tiles, c, old_student, student, student_tiles, student_c, i,
    R: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, AGREE: tl.constexpr,
):  # fmt: skip
    """One step of a teacher's running numbers, beside the same ids of the student."""
    m, z, a, extent, best = teacher
    top = raised(m, tiles)
    dt = clip((m - top) * c)
    ds = clip((old_student[0] - student[0]) * student_c)
    a = moved(a, z, ds, dt, KIND)
    z *= tl.exp2(dt)
    for u in tl.static_range(len(tiles)):
        s, t = student_tiles[u], tiles[u]
        xt = (t - top[:, None]) * c
        xs = (s - student[0][:, None]) * student_c
        z += tl.sum(tl.exp2(xt), axis=1)
        if KIND == "forward_kl":
            a += tl.sum(tl.exp2(xt) * (clip(xt) - clip(xs)), axis=1)
        elif KIND == "cross_entropy":
            a -= tl.sum(tl.exp2(xt) * clip(xs), axis=1)
        if KIND == "mse":
            d = tl.where(s == t, 0.0, s - t)
            a += tl.sum(d * d, axis=1)
            extent += tl.sum(tl.where((s == -float("inf")) & (t == s), 0.0, 1.0), axis=1)
        elif KIND != "two_pass":
            extent = tl.maximum(extent, tl.max(tl.where(s == -float("inf"), t, -float("inf")), axis=1))
    if AGREE:
        best = first_at(best, m, top, tiles, i, R, K)
    return top, z, a, extent, best


@triton.jit
def merged(m, z, c):
    """max and sum of several threads or parts, as one."""
    top = tl.max(m, axis=0)
    return top, tl.sum(z * tl.exp2((m - top) * c), axis=0)


@triton.jit
def merged_best(m, best):
    return tl.min(tl.where(m == tl.max(m, axis=0), best, NOWHERE), axis=0)


@triton.jit
def merged_teacher(teacher, c, student_m, student_c, KIND: tl.constexpr):
    m, z, a, extent, best = teacher
    dt = clip((m - tl.max(m, axis=0)) * c)
    ds = clip((student_m - tl.max(student_m, axis=0)) * student_c)
    a = tl.sum(moved(a, z, ds, dt, KIND), axis=0)
    if KIND == "mse":
        extent = tl.sum(extent, axis=0)
    else:
        extent = tl.max(extent, axis=0)
    top, z = merged(m, z, c)
    return top, z, a, extent, merged_best(m, best)


@triton.jit
def log_normaliser(m, z, WITHOUT: tl.constexpr = False):
    """max and log-sum as they are kept: a row without a finite logit has maximum -inf and log-sum NaN.

    WITHOUT: that is no such row if only its target is finite, and the log-sum is -inf.
    """
    nothing = -float("inf") if WITHOUT else float("nan")
    return tl.where(z == 0, -float("inf"), m), tl.where(z == 0, nothing, tl.log(z))


@triton.jit
def one_pass_value(ms, zs, mt, zt, a, extent, KIND: tl.constexpr):
    """A divergence in nats and its omega."""
    if KIND == "mse":
        value = a / extent
        usable = (ms < float("inf")) & (mt < float("inf")) & (zs != 0) & (zt != 0)
        value = tl.where(usable, value, float("nan"))
        omega = tl.where(tl.abs(value) < float("inf"), extent, value)
    else:
        if KIND == "forward_kl":
            value = a / zt - tl.log2(zt / zs)
        else:
            value = a / zt + tl.log2(zs)
        value = tl.where(extent > -float("inf"), float("inf"), value * LN2)
        value = tl.where((zs > 0) & (zt > 0), value, float("nan"))
        omega = tl.where(value == value, -1.0, value)
    return value, omega


@triton.jit
def hard_value(m, z, total, pivot, label_logit, V, smoothing, z_loss, SMOOTH: tl.constexpr):
    """H = -(1-eps) log q_y - eps mean_j log q_j + z_loss logsumexp(s)^2."""
    m, logsum = log_normaliser(m, z)
    value = tl.where(smoothing == 1, 0.0, (smoothing - 1) * ((label_logit - m) - logsum))
    if SMOOTH:
        value -= smoothing * ((total / V + (pivot - m)) - logsum)
    return value + z_loss * (m + logsum) * (m + logsum)
