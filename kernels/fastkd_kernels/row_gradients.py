# ruff: noqa: RUF005, SIM108 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""Kernel 3: the gradient of the student's logits, from the logits and the row's state.

weight * sum_k (1 - alpha) share_k q (h_k - omega_k) T**2 / T  +  weight * alpha * (the slope of the hard term)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    ABSENT,
    FIRST_TEACHER,
    FREE,
    HARD_LOGSUM,
    HARD_MAX,
    LOG2E,
    MASK,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    TEACHER_COLUMNS,
    WEIGHT,
    aligned,
    all_but,
    but,
    cut,
    edge,
    first_logit,
    load_edge,
    load_edges,
    load_step,
    load_steps,
    misalignment,
    narrow,
    number,
    offsets,
    part_of,
    position_of,
    scale_of,
    scales_of,
    shares_of,
    teacher_rows,
    temperature_of,
)


@triton.jit
def teacher_side(columns, scale, factor, t, odds, KIND: tl.constexpr, SQUARED: tl.constexpr):
    """max, scale, log2 sum, omega, the factor of q (h - omega), and whether the term is there at all."""
    omega = tl.load(columns + 2).to(tl.float32)
    alive = (factor != 0) & (omega != float("inf"))
    if len(odds) > 0:
        factor = tl.where(omega == float("inf"), 0.0, factor)
        alive = alive | (odds[1] != 0)
    if KIND == "mse":
        factor = 2 * factor / omega
    elif SQUARED:
        factor = factor * t
    else:
        factor = factor / t
    return (
        tl.where(alive, tl.load(columns).to(tl.float32), 0.0),
        tl.where(alive, scale, 1.0),
        tl.where(alive, (tl.load(columns + 1) * LOG2E).to(tl.float32), ABSENT),
        tl.where(alive, omega, 0.0),
        tl.where(alive, factor, 0.0),
        alive,
    )


@triton.jit
def hard_side(saved, factor, target, row, V, shift, smoothing, z_loss):
    """max, log2 sum, the factors of q, of every id and of the label, the label's position, whether it is there."""
    highest, logsum = tl.load(saved + HARD_MAX).to(tl.float32), tl.load(saved + HARD_LOGSUM).to(tl.float32)
    label = tl.load(target + row)
    alive = factor != 0
    return (
        tl.where(alive, highest, 0.0),
        tl.where(alive, logsum * LOG2E, ABSENT),
        tl.where(alive, factor * (1 + 2 * z_loss * (highest + logsum)), 0.0),
        tl.where(alive, factor * smoothing / V, 0.0),
        tl.where(alive, factor * (1 - smoothing), 0.0),
        tl.where((label >= 0) & (label < V), label, -1).to(tl.int32) + shift,
        alive,
    )


@triton.jit
def soft_slope(s, t, student, teachers, beta, rest, KIND: tl.constexpr, TERM: tl.constexpr):
    """sum_k factor_k q (h_k - omega_k) of one tile, and log2 q."""
    slope = tl.zeros(s.shape, tl.float32)
    lq = tl.fma(s - student[0], student[1], -student[2])
    for k in tl.static_range(len(teachers)):
        m, c, logsum, omega, factor, alive = teachers[k]
        if KIND == "mse":
            d = tl.where((s == t[k]) | (alive == 0), 0.0, s - t[k])
            slope = tl.fma(d, factor, slope)
        else:
            _, h, q = TERM(tl.fma(t[k] - m, c, -logsum), lq, beta, rest)
            if KIND == "forward_kl":
                slope = tl.fma(q + h, factor, slope)
            else:
                slope = tl.fma(q * (h - omega), factor, slope)
    return slope, lq


@triton.jit
def centred(s, highest, lift):
    """s - mean, and 0 for a mask."""
    return tl.where(s > MASK, (s - highest) + lift, 0.0)


@triton.jit
def hard_slope(s, lq, hard, at, SAME: tl.constexpr):
    """factor (1 + 2 z_loss logsumexp) q - factor eps / V - factor (1 - eps) [j = y]."""
    m, logsum, of_q, of_all, of_label, label, _ = hard
    if not SAME:
        lq = tl.fma(s - m, LOG2E, -logsum)
    return tl.where(at == label, -of_label, 0.0) + tl.fma(tl.exp2(lq), of_q, -of_all)


@triton.jit
def write_slopes(
    g, s, t, i, first, last, student, teachers, hard, extra, beta, rest,
    R: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, TERM: tl.constexpr,
    HARD: tl.constexpr, SAME: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient of the tiles at position i. In the loop every store but those at the edges is 16 bytes wide."""
    odds, standard = extra
    others = s
    if len(odds) > 0:
        others, t = but(s, odds[0], i, R, K), all_but(t, odds[0], i, R, K)
    for u in tl.static_range(len(s)):
        at = i + u * R * K + offsets(R, K)
        slope = tl.zeros([R, K], tl.float32)
        lq = slope
        if len(teachers) > 0:
            tiles = ()
            for k in tl.static_range(len(teachers)):
                tiles = tiles + (t[k][u],)
            slope, lq = soft_slope(others[u], tiles, student, teachers, beta, rest, KIND, TERM)
            if len(odds) > 0:
                slope = tl.where(at == odds[0], odds[1], tl.fma(tl.exp2(lq), -odds[1], slope))
        if len(standard) > 0:
            slope = tl.fma(centred(s[u], student[0], standard[1]), standard[0], slope)
        if HARD:
            slope += hard_slope(s[u], lq, hard, at, SAME)
        slope = narrow(slope, g.dtype.element_ty)
        if EDGE:
            tl.store(g + at, slope, mask=(at >= first) & (at < last))
        else:
            tl.store(g + at, slope)


@triton.jit
def extras_of(target, label_slope, along_rows, lift_rows, row, shift, V, WITHOUT: tl.constexpr):
    """The target's position and slope, and the numbers of standardised logits; each where it is asked for."""
    odds, standard = (), ()
    if WITHOUT:
        odds = (position_of(target, row, shift, V), number(label_slope, 0.0, row))
    if along_rows is not None:
        standard = (number(along_rows, 0.0, row), number(lift_rows, 0.0, row))
    return odds, standard


@triton.jit
def row_weight_of(saved, upstream, upstream_stride, scale, row):
    """What the terms of this row are multiplied with before their own weights, and whether the row counts."""
    own = tl.load(saved + WEIGHT).to(tl.float32)
    weight = tl.load(upstream + row.to(tl.int64) * upstream_stride).to(tl.float32) * own
    if scale is not None:
        weight *= tl.load(scale).to(tl.float32)
    return weight, own != 0


@triton.jit
def student_side(saved, c, taught, hard, SAME: tl.constexpr):
    """max, scale, log2 sum of the softmax that soft terms use, and with SAME the hard term too."""
    highest = tl.where(taught, tl.load(saved + STUDENT_MAX).to(tl.float32), 0.0)
    logsum = tl.where(taught, (tl.load(saved + STUDENT_LOGSUM) * LOG2E).to(tl.float32), ABSENT)
    if SAME:
        highest, logsum = tl.where(hard[6], hard[0], highest), tl.where(hard[6], hard[1], logsum)
    else:
        # Without a soft term the temperature may be a NaN, and a logit times 0 would be one where it is -inf.
        c = tl.where(taught, c, 1.0)
    return highest, c, logsum


@triton.jit
def gradient_sides(
    saved, weight, row, shift, target, alpha, temperature, c, stretch, scales, shares, odds, V, smoothing, z_loss,
    KIND: tl.constexpr, SQUARED: tl.constexpr, HARD: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Numbers of the student, the teachers and the hard term, and which logits are read.

    That is the student's beyond the shared ids, its shared ones, and each teacher's.
    """
    hard = ()
    needed = weight != weight
    if HARD:
        hard = hard_side(saved, weight * alpha, target, row, V, shift, smoothing, z_loss)
        needed = hard[6]
    teachers = ()
    present = ()
    taught = weight != weight
    for k in tl.static_range(len(shares)):
        factor = weight * (1 - alpha) * shares[k] / stretch
        columns = saved + FIRST_TEACHER + TEACHER_COLUMNS * k
        side = teacher_side(columns, scales[k], factor, temperature, odds, KIND, SQUARED)
        teachers = teachers + (side,)
        present = present + (side[5],)
        taught = taught | side[5]
    student = ()
    if len(shares) > 0:
        student = student_side(saved, c, taught, hard, SAME)
    return student, teachers, hard, needed, needed | taught, present


@triton.jit(**FREE)
def row_gradient(
    gradient, gradient_stride, student, student_stride, teacher, teacher_stride, others, other_strides, target,
    alpha_rows, alpha, temperature_rows, temperature, stretch_rows, teacher_temperature_rows, teacher_temperatures,
    share_rows, shares, state, upstream, upstream_stride, scale, label_slope, along_rows, lift_rows,
    V, shared, chunk, smoothing, z_loss, beta, rest,
    KIND: tl.constexpr, TERM: tl.constexpr, SQUARED: tl.constexpr, HARD: tl.constexpr, SAME: tl.constexpr,
    BEYOND: tl.constexpr, WITHOUT: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Kernel 3. The last rows come first: they are the ones that a forward pass left in the cache.

    A term whose factor is 0 is not read, so whatever stands there contributes exactly 0. The gradient may be written
    over the student: every id is read and written by the same thread, in that order. WITHOUT: the target is left out
    of the soft term, and gets ``label_slope``, which the others lose. With ``along_rows`` logits are standardised.
    """
    TEACHERS: tl.constexpr = len(shares)
    row, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    s = aligned(student_row, shift, K)
    t = teacher_rows(teacher, teacher_stride, others, other_strides, row, shift, K)
    g = aligned(first_logit(gradient, row, gradient_stride), shift, K)
    saved = state + row.to(tl.int64) * (FIRST_TEACHER + TEACHER_COLUMNS * TEACHERS)
    weight, _ = row_weight_of(saved, upstream, upstream_stride, scale, row)
    extra = extras_of(target, label_slope, along_rows, lift_rows, row, shift, V, WITHOUT)
    scales = scales_of(teacher_temperature_rows, teacher_temperatures, row)
    pupil, teachers, hard, needed_beyond, needed, present = gradient_sides(
        saved, weight, row, shift, target, number(alpha_rows, alpha, row),
        temperature_of(temperature_rows, temperature, row), scale_of(temperature_rows, temperature, stretch_rows, row),
        number(stretch_rows, 1.0, row), scales, shares_of(share_rows, shares, row), extra[0], V, smoothing,
        z_loss, KIND, SQUARED, HARD, SAME,
    )  # fmt: skip

    if TEACHERS > 0:
        first, last = part_of(part, chunk, shift, shift + shared)
        body, tail, edges = cut(first, last, R, K, U)
        for e in range(edges):
            i = edge(e, first, tail, R, K)
            x = load_edge(s, i, first, last, R, K, needed)
            y = load_edges(t, i, first, last, R, K, present)
            write_slopes(
                g, x, y, i, first, last, pupil, teachers, hard, extra, beta, rest, R, K, KIND, TERM, HARD, SAME, True
            )
        for i in tl.range(body, tail, R * K * U, num_stages=1):
            x = load_step(s, i, R, K, U, needed)
            y = load_steps(t, i, R, K, U, present)
            write_slopes(
                g, x, y, i, first, last, pupil, teachers, hard, extra, beta, rest, R, K, KIND, TERM, HARD, SAME, False
            )

    if BEYOND:
        extra = ((), ())
        first, last = part_of(part, chunk, shift + shared, shift + V)
        body, tail, edges = cut(first, last, R, K, U)
        for e in range(edges):
            i = edge(e, first, tail, R, K)
            x = load_edge(s, i, first, last, R, K, needed_beyond)
            write_slopes(g, x, (), i, first, last, (), (), hard, extra, beta, rest, R, K, KIND, TERM, HARD, False, True)
        for i in tl.range(body, tail, R * K * U, num_stages=1):
            x = load_step(s, i, R, K, U, needed_beyond)
            write_slopes(
                g, x, (), i, first, last, (), (), hard, extra, beta, rest, R, K, KIND, TERM, HARD, False, False
            )
