# ruff: noqa: RUF005 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""Kernel 2: the divergences that need both normalisers first. It reads all logits again, and sums v, q h and q."""

from __future__ import annotations

import triton
import triton.language as tl

from .row_values import load_parts, store_all
from .rows import (
    FIRST_TEACHER,
    FREE,
    HARD_TERM,
    LOG2E,
    SOFT_TERM,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    TEACHER_COLUMNS,
    WEIGHT,
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
def add_sums(sums, s, t, student, teachers, beta, rest, TERM: tl.constexpr):
    """Adds v, q h and q of a step to each teacher's sums; ``student`` and ``teachers`` are max, scale, log2 sum."""
    added = ()
    for k in tl.static_range(len(teachers)):
        values, slopes, mass = sums[k]
        for u in tl.static_range(len(s)):
            lp = tl.fma(t[k][u] - teachers[k][0], teachers[k][1], -teachers[k][2])
            lq = tl.fma(s[u] - student[0], student[1], -student[2])
            v, h, q = TERM(lp, lq, beta, rest)
            values += tl.sum(v, axis=1)
            slopes += tl.sum(q * h, axis=1)
            mass += tl.sum(q, axis=1)
        added = added + ((values, slopes, mass),)
    return added


@triton.jit
def wide_sum(x):
    return tl.sum(x.to(tl.float64), axis=0)


@triton.jit
def conclude_divergence(row, saved, sums, alpha, temperature, shares, loss, SQUARED: tl.constexpr):
    """Omegas, the soft term and the row's loss from the sums of v, q h and q."""
    TEACHERS: tl.constexpr = len(sums)
    weight = tl.load(saved + WEIGHT).to(tl.float32)
    active = (weight != 0) & (alpha != 1)
    soft = tl.zeros([], tl.float32)
    for k in tl.static_range(TEACHERS):
        value, slope, mass = sums[k]
        omega = tl.where(value == float("inf"), value, slope / mass)
        if SQUARED:
            value *= temperature * temperature
        taught = active & (shares[k] != 0)
        soft += tl.where(taught, shares[k] * value, 0.0).to(tl.float32)
        tl.store(saved + FIRST_TEACHER + TEACHER_COLUMNS * k + 2, tl.where(taught, omega, 0.0))
    tl.store(saved + SOFT_TERM, soft)
    tl.store(loss + row, weight * (alpha * tl.load(saved + HARD_TERM).to(tl.float32) + (1 - alpha) * soft))


@triton.jit(**FREE)
def divergence_sums(
    student, student_stride, teacher, teacher_stride, others, other_strides,
    alpha_rows, alpha, temperature_rows, temperature, stretch_rows, teacher_temperature_rows, teacher_temperatures,
    share_rows, shares, state, loss, partials, shared, chunk, parts, beta, rest,
    TERM: tl.constexpr, SQUARED: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Kernel 2."""
    TEACHERS: tl.constexpr = len(shares)
    row, part = tl.program_id(0), tl.program_id(1)
    saved = state + row.to(tl.int64) * (FIRST_TEACHER + TEACHER_COLUMNS * TEACHERS)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    s = aligned(student_row, shift, K)
    t = teacher_rows(teacher, teacher_stride, others, other_strides, row, shift, K)
    scales = scales_of(teacher_temperature_rows, teacher_temperatures, row)
    c = scale_of(temperature_rows, temperature, stretch_rows, row)
    student_side = (
        tl.load(saved + STUDENT_MAX).to(tl.float32),
        c,
        (tl.load(saved + STUDENT_LOGSUM) * LOG2E).to(tl.float32),
    )
    teacher_sides = ()
    sums = ()
    for k in tl.static_range(TEACHERS):
        columns = saved + FIRST_TEACHER + TEACHER_COLUMNS * k
        teacher_sides = teacher_sides + (
            (tl.load(columns).to(tl.float32), scales[k], (tl.load(columns + 1) * LOG2E).to(tl.float32)),
        )
        zero = tl.zeros([R], tl.float32)
        sums = sums + ((zero, zero, zero),)

    needed = (tl.load(saved + WEIGHT).to(tl.float32) != 0) & (number(alpha_rows, alpha, row) != 1)
    first, last = part_of(part, chunk, shift, shift + shared * needed.to(tl.int32))
    body, tail, edges = cut(first, last, R, K, U)
    for e in range(edges):
        i = edge(e, first, tail, R, K)
        tiles = load_edge(s, i, first, last, R, K)
        sums = add_sums(sums, tiles, load_edges(t, i, first, last, R, K), student_side, teacher_sides, beta, rest, TERM)
    for i in tl.range(body, tail, R * K * U, num_stages=1):
        tiles = load_step(s, i, R, K, U)
        sums = add_sums(sums, tiles, load_steps(t, i, R, K, U), student_side, teacher_sides, beta, rest, TERM)

    totals = ()
    for k in tl.static_range(TEACHERS):
        totals = totals + ((wide_sum(sums[k][0]), wide_sum(sums[k][1]), wide_sum(sums[k][2])),)
    if partials is None:
        conclude_divergence(
    row, saved, totals, number(alpha_rows, alpha, row), temperature_of(temperature_rows, temperature, row),
    shares_of(share_rows, shares, row), loss, SQUARED,
)  # fmt: skip
    else:
        for k in tl.static_range(TEACHERS):
            store_all(partials + ((row.to(tl.int64) * parts + part) * TEACHERS + k) * 3, totals[k])


@triton.jit(**FREE)
def merge_divergence(
    alpha_rows, alpha, temperature_rows, temperature, share_rows, shares, state, loss, partials, parts,
    TEACHERS: tl.constexpr, SQUARED: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sums = ()
    for k in tl.static_range(TEACHERS):
        values = tl.sum(load_parts(partials, row, parts, 3 * k, 3 * TEACHERS, 0.0, MAX), axis=0)
        slopes = tl.sum(load_parts(partials, row, parts, 3 * k + 1, 3 * TEACHERS, 0.0, MAX), axis=0)
        mass = tl.sum(load_parts(partials, row, parts, 3 * k + 2, 3 * TEACHERS, 0.0, MAX), axis=0)
        sums = sums + ((values, slopes, mass),)
    saved = state + row.to(tl.int64) * (FIRST_TEACHER + TEACHER_COLUMNS * TEACHERS)
    conclude_divergence(
    row, saved, sums, number(alpha_rows, alpha, row), temperature_of(temperature_rows, temperature, row),
    shares_of(share_rows, shares, row), loss, SQUARED,
)  # fmt: skip
