"""What the slopes of a sparse teacher's events do to the student's logits.

4. ``named_gradients``, one small program a row, computes what the k ids get while their logits are still there.
5. ``spread_gradient`` reads the student and writes all else: the tail's slope by the shares in it, and the hard term.
6. ``place_named`` puts the first over the second: launches come one after the other, whatever shared a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_gradients import hard_side, hard_slope, row_weight_of
from .rows import (
    ABSENT,
    FIRST_TEACHER,
    FREE,
    LOG2E,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    WEIGHT,
    aligned,
    cut,
    edge,
    first_logit,
    load_edge,
    load_step,
    misalignment,
    narrow,
    number,
    offsets,
    part_of,
    temperature_of,
)
from .topk_values import load_ids, load_named

# As the logarithm of the tail's probability: below, a float says nothing of the shares in it.
FARTHEST = tl.constexpr(-4.0e6)


@triton.jit(**FREE)
def named_gradients(
    student, student_stride, indices, target, alpha_rows, alpha, state, slopes, values, spoilt,
    upstream, upstream_stride, scale, V, shared, count, smoothing, z_loss,
    HARD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Kernel 4. ``spoilt`` becomes NaN where a slope is, else 0: something to add to each element of the row."""
    row = tl.program_id(0)
    saved = state + row.to(tl.int64) * FIRST_TEACHER
    a = number(alpha_rows, alpha, row)
    weight, counts = row_weight_of(saved, upstream, upstream_stride, scale, row)
    soft = counts & (a != 1)
    mine = slopes + row.to(tl.int64) * (count + 1)
    found = tl.zeros([B], tl.float32)
    student_row = first_logit(student, row, student_stride)
    read = 0
    if HARD:
        hard = hard_side(saved, weight * a, target, row, V, 0, smoothing, z_loss)
        read = tl.where(hard[6], count, 0)
    for j in range(0, tl.where(soft, count, 0), B):
        entry, _, _, id = load_ids(indices, row, j, count, shared, B)
        slope = tl.load(mine + entry, mask=entry < count, other=0.0)
        found += tl.where(slope == slope, 0.0, slope)
        if HARD:
            # A logit without a weight is not looked at: it may be a NaN.
            _, x, _ = load_named(student_row, indices, row, j, read, shared, B)
            slope += hard_slope(x, x, hard, id, False)
        tl.store(values + row.to(tl.int64) * count + entry, slope, mask=entry < count)
    last = tl.load(mine + count)
    found = tl.sum(found, axis=0) + tl.where(last == last, 0.0, last)
    tl.store(spoilt + row, tl.where(soft, found, 0.0))


@triton.jit
def tail_side(saved, soft, slope, event, c):
    """max, scale, log2 of the tail's part of the sum, the factor of an id's share, and whether there is any."""
    alive = soft & (slope != 0) & ((event >= FARTHEST) | (event != event))
    logsum = tl.load(saved + STUDENT_LOGSUM) + event
    return (
        tl.where(alive, tl.load(saved + STUDENT_MAX).to(tl.float32), 0.0),
        tl.where(alive, c, 1.0),
        tl.where(alive, (logsum * LOG2E).to(tl.float32), ABSENT),
        tl.where(alive, slope, 0.0),
        alive,
    )


@triton.jit
def same_side(tail, hard, event):
    """One softmax for both terms: of a share in the tail, or without a tail that of the hard term alone."""
    m, c, logsum, factor, alive = tail
    m, logsum = tl.where(alive, m, hard[0]), tl.where(alive, logsum, hard[1])
    of_q = tl.where(alive, hard[2] * tl.exp2(event * LOG2E), hard[2])
    return (m, tl.where(alive, c, LOG2E), logsum, factor, alive), (
        hard[0], hard[1], of_q, hard[3], hard[4], hard[5], hard[6],
    )  # fmt: skip


@triton.jit
def write_spread(
    g, s, i, first, last, tail, hard, spoilt,
    R: tl.constexpr, K: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient of the tiles at position i. In the loop every store is 16 bytes wide."""
    for u in tl.static_range(len(s)):
        at = i + u * R * K + offsets(R, K)
        slope = tl.zeros([R, K], tl.float32) + spoilt
        lq = slope
        if SOFT:
            lq = tl.fma(s[u] - tail[0], tail[1], -tail[2])
            slope = tl.fma(tl.exp2(lq), tail[3], slope)
        if HARD:
            slope += hard_slope(s[u], lq, hard, at, SAME)
        slope = narrow(slope, g.dtype.element_ty)
        if EDGE:
            tl.store(g + at, slope, mask=(at >= first) & (at < last))
        else:
            tl.store(g + at, slope)


@triton.jit(**FREE)
def spread_gradient(
    gradient, gradient_stride, student, student_stride, target, alpha_rows, alpha, temperature_rows, temperature,
    state, events, slopes, spoilt, upstream, upstream_stride, scale, V, shared, chunk, count, smoothing, z_loss,
    HARD: tl.constexpr, SAME: tl.constexpr, BEYOND: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Kernel 5. What stands at the named ids is written over. It may be the student's own memory."""
    row, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    s = aligned(student_row, shift, K)
    g = aligned(first_logit(gradient, row, gradient_stride), shift, K)
    saved = state + row.to(tl.int64) * FIRST_TEACHER
    a = number(alpha_rows, alpha, row)
    weight, counts = row_weight_of(saved, upstream, upstream_stride, scale, row)
    last_event = row.to(tl.int64) * (count + 1) + count
    event = tl.load(events + last_event)
    c = LOG2E / temperature_of(temperature_rows, temperature, row)
    tail = tail_side(saved, counts & (a != 1), tl.load(slopes + last_event), event, c)
    nan = tl.load(spoilt + row)
    hard = ()
    needed_beyond = counts != counts
    if HARD:
        hard = hard_side(saved, weight * a, target, row, V, shift, smoothing, z_loss)
        needed_beyond = hard[6]
    needed = needed_beyond | tail[4]
    shared_hard = hard
    if SAME:
        tail, shared_hard = same_side(tail, hard, event)

    first, last = part_of(part, chunk, shift, shift + shared)
    body, rest, edges = cut(first, last, R, K, U)
    for e in range(edges):
        i = edge(e, first, rest, R, K)
        x = load_edge(s, i, first, last, R, K, needed)
        write_spread(g, x, i, first, last, tail, shared_hard, nan, R, K, True, HARD, SAME, True)
    for i in tl.range(body, rest, R * K * U, num_stages=1):
        x = load_step(s, i, R, K, U, needed)
        write_spread(g, x, i, first, last, tail, shared_hard, nan, R, K, True, HARD, SAME, False)

    if BEYOND:
        first, last = part_of(part, chunk, shift + shared, shift + V)
        body, rest, edges = cut(first, last, R, K, U)
        for e in range(edges):
            i = edge(e, first, rest, R, K)
            x = load_edge(s, i, first, last, R, K, needed_beyond)
            write_spread(g, x, i, first, last, tail, hard, nan, R, K, False, HARD, False, True)
        for i in tl.range(body, rest, R * K * U, num_stages=1):
            x = load_step(s, i, R, K, U, needed_beyond)
            write_spread(g, x, i, first, last, tail, hard, nan, R, K, False, HARD, False, False)


@triton.jit(**FREE)
def place_named(
    gradient, gradient_stride, indices, alpha_rows, alpha, state, values, spoilt, shared, count, B: tl.constexpr
):
    """Kernel 6."""
    row = tl.program_id(0)
    g = first_logit(gradient, row, gradient_stride)
    counts = tl.load(state + row.to(tl.int64) * FIRST_TEACHER + WEIGHT) != 0
    soft = counts & (number(alpha_rows, alpha, row) != 1)
    nan = tl.load(spoilt + row)
    for j in range(0, tl.where(soft, count, 0), B):
        entry, _, known, id = load_ids(indices, row, j, count, shared, B)
        value = tl.load(values + row.to(tl.int64) * count + entry, mask=known, other=0.0) + nan
        tl.store(g + id, narrow(value, gradient.dtype.element_ty), mask=known)
