# ruff: noqa: RUF005 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""What standardised logits take beside the kernels of all: the moments of a row, and the gradient along its logits.

Each program leaves the numbers of its part of a row. They are few, and merged where the kernels are launched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_gradients import centred, gradient_sides, row_weight_of, soft_slope
from .row_values import counted_weight
from .rows import (
    FIRST_TEACHER,
    FREE,
    MASK,
    TEACHER_COLUMNS,
    aligned,
    cut,
    edge,
    first_logit,
    load_edge,
    load_edges,
    load_step,
    load_steps,
    misalignment,
    number,
    part_of,
    scale_of,
    scales_of,
    shares_of,
    teacher_rows,
    temperature_of,
)


@triton.jit
def see_moments(running, tiles):
    """Count, mean and sum of squares about it, of each thread, with one step more.

    A mean is a pivot, one of the thread's own logits, and what lies beyond: where all are equal that and the squares
    are exactly 0, and no offset costs digits.
    """
    count, pivot, mean, squares = running
    top = tl.max(tiles[0], axis=1)
    for u in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tl.max(tiles[u], axis=1))
    pivot = tl.where((count == 0) & (top > MASK), top, pivot)
    origin = pivot[:, None]
    added = tl.zeros(count.shape, tl.float32)
    total = added
    for u in tl.static_range(len(tiles)):
        counted = tiles[u] > MASK
        added += tl.sum(counted.to(tl.float32), axis=1)
        total += tl.sum(tl.where(counted, (tiles[u] - origin) - mean[:, None], 0.0), axis=1)
    apart = total / tl.maximum(added, 1.0)
    centre = (mean + apart)[:, None]
    for u in tl.static_range(len(tiles)):
        d = tl.where(tiles[u] > MASK, (tiles[u] - origin) - centre, 0.0)
        squares += tl.sum(d * d, axis=1)
    share = added / tl.maximum(count + added, 1.0)
    between = tl.where(count > 0, apart * apart * count * share, 0.0)
    return count + added, pivot, mean + apart * share, squares + between


@triton.jit(**FREE)
def moments(
    student, student_stride, target, row_weight, partials, shared, chunk, parts, ignore_index,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Of the first ``shared`` logits of one side; a row that does not count is not read."""
    row, part = tl.program_id(0), tl.program_id(1)
    read = (counted_weight(row_weight, target, ignore_index, row) != 0).to(tl.int32)
    side = first_logit(student, row, student_stride)
    shift = misalignment(side, K)
    s = aligned(side, shift, K)
    zero = tl.zeros([R], tl.float32)
    running = (zero, zero, zero, zero)
    first, last = part_of(part, chunk, shift, shift + shared * read)
    body, tail, edges = cut(first, last, R, K, U)
    for e in range(edges):
        running = see_moments(running, load_edge(s, edge(e, first, tail, R, K), first, last, R, K))
    for i in tl.range(body, tail, R * K * U, num_stages=1):
        running = see_moments(running, load_step(s, i, R, K, U))
    counts, means = running[0].to(tl.float64), running[1].to(tl.float64) + running[2].to(tl.float64)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(counts * means, axis=0) / tl.maximum(count, 1.0)
    apart = means - mean
    place = partials + (row.to(tl.int64) * parts + part) * 3
    tl.store(place, count)
    tl.store(place + 1, mean)
    tl.store(place + 2, tl.sum(running[3].to(tl.float64) + counts * apart * apart, axis=0))


@triton.jit
def add_along(total, s, t, student, teachers, lift, beta, rest, KIND: tl.constexpr, TERM: tl.constexpr):
    for u in tl.static_range(len(s)):
        tiles = ()
        for k in tl.static_range(len(teachers)):
            tiles = tiles + (t[k][u],)
        slope, _ = soft_slope(s[u], tiles, student, teachers, beta, rest, KIND, TERM)
        total += tl.sum(slope * centred(s[u], student[0], lift), axis=1)
    return total


@triton.jit(**FREE)
def along_sums(
    student, student_stride, teacher, teacher_stride, others, other_strides,
    alpha_rows, alpha, temperature_rows, temperature, stretch_rows, teacher_temperature_rows, teacher_temperatures,
    share_rows, shares, state, upstream, upstream_stride, scale, lift_rows, partials,
    V, shared, chunk, parts, beta, rest,
    KIND: tl.constexpr, TERM: tl.constexpr, SQUARED: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The sum of s - mean times the soft part of the gradient."""
    TEACHERS: tl.constexpr = len(shares)
    row, part = tl.program_id(0), tl.program_id(1)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    s = aligned(student_row, shift, K)
    t = teacher_rows(teacher, teacher_stride, others, other_strides, row, shift, K)
    saved = state + row.to(tl.int64) * (FIRST_TEACHER + TEACHER_COLUMNS * TEACHERS)
    weight, _ = row_weight_of(saved, upstream, upstream_stride, scale, row)
    pupil, teachers, _, _, needed, present = gradient_sides(
        saved, weight, row, shift, None, number(alpha_rows, alpha, row),
        temperature_of(temperature_rows, temperature, row), scale_of(temperature_rows, temperature, stretch_rows, row),
        number(stretch_rows, 1.0, row), scales_of(teacher_temperature_rows, teacher_temperatures, row),
        shares_of(share_rows, shares, row), (), V, 0.0, 0.0, KIND, SQUARED, False, False,
    )  # fmt: skip
    lift = number(lift_rows, 0.0, row)
    total = tl.zeros([R], tl.float32)
    first, last = part_of(part, chunk, shift, shift + shared)
    body, tail, edges = cut(first, last, R, K, U)
    for e in range(edges):
        i = edge(e, first, tail, R, K)
        x = load_edge(s, i, first, last, R, K, needed)
        y = load_edges(t, i, first, last, R, K, present)
        total = add_along(total, x, y, pupil, teachers, lift, beta, rest, KIND, TERM)
    for i in tl.range(body, tail, R * K * U, num_stages=1):
        x, y = load_step(s, i, R, K, U, needed), load_steps(t, i, R, K, U, present)
        total = add_along(total, x, y, pupil, teachers, lift, beta, rest, KIND, TERM)
    tl.store(partials + row.to(tl.int64) * parts + part, tl.sum(total.to(tl.float64), axis=0))
