# ruff: noqa: RUF005, SIM108 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""Kernel 1: what a row is worth. It leaves the row's state and loss, or its parts' numbers to be merged.

``statistics`` reads student and teachers once: normalisers, agreement, the hard term, and the value of every divergence
that one pass can give. The others take the kernel of ``divergence_values.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    FIRST_TEACHER,
    FREE,
    HARD_LOGSUM,
    HARD_MAX,
    HARD_TERM,
    LOG2E,
    LOWEST,
    SOFT_TERM,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    STUDENT_PARTIALS,
    TARGET_AGREES,
    TEACHER_AGREES,
    TEACHER_COLUMNS,
    TEACHER_PARTIALS,
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
    number,
    part_of,
    position_of,
    scale_of,
    scales_of,
    shares_of,
    teacher_rows,
    temperature_of,
)
from .statistics import (
    hard_value,
    log_normaliser,
    merged,
    merged_best,
    merged_teacher,
    no_student,
    no_teachers,
    one_pass_value,
    see_student,
    see_teacher,
)


@triton.jit
def counted_weight(row_weight, target, ignore_index, row):
    weight = tl.full([], 1.0, tl.float32)
    if row_weight is not None:
        weight = tl.load(row_weight + row).to(tl.float32)
    if target is not None:
        weight = tl.where(tl.load(target + row) == ignore_index, 0.0, weight)
    return weight


@triton.jit
def label_of(student, target, row, V):
    """Whether the label is an id, the label, its logit, and that logit or 0 where it is infinite (the pivot)."""
    label = tl.load(target + row)
    known = (label >= 0) & (label < V)
    label = tl.where(known, label, 0).to(tl.int32)
    logit = tl.load(student + label).to(tl.float32)
    return known, label, logit, tl.where(tl.abs(logit) < float("inf"), logit, 0.0)


@triton.jit
def see_both(
    student, teachers, s, t, absent, c, scales, pivot, i, first, last,
    R: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    HARD: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr, EDGE: tl.constexpr, WITHOUT: tl.constexpr,
):  # fmt: skip
    old = student
    if WITHOUT:
        s, t = but(s, absent, i, R, K), all_but(t, absent, i, R, K)
    student = see_student(student, s, c, pivot, i, first, last, R, K, True, HARD, SMOOTH, AGREE, EDGE)
    seen = ()
    for k in tl.static_range(len(teachers)):
        seen = seen + (see_teacher(teachers[k], t[k], scales[k], old, student, s, c, i, R, K, KIND, AGREE),)
    return student, seen


@triton.jit
def store_all(pointer, values):
    for j in tl.static_range(len(values)):
        x = values[j]
        if x.dtype == tl.int32:
            x = x.to(tl.float32, bitcast=True)
        tl.store(pointer + j, x)


@triton.jit
def conclude_hard(
    saved, active, m, z, total, student_row, target, row, V, smoothing, z_loss,
    HARD: tl.constexpr, SMOOTH: tl.constexpr, WITHOUT: tl.constexpr = False,
):  # fmt: skip
    """The hard term and its columns of the state. WITHOUT: the target is not among what was summed."""
    hard = tl.zeros([], tl.float32)
    highest, logsum = hard, hard
    if HARD:
        known, _, label_logit, pivot = label_of(student_row, target, row, V)
        if WITHOUT:
            top = tl.maximum(m, label_logit)
            z = z * tl.exp2((m - top) * LOG2E) + tl.exp2((label_logit - top) * LOG2E)
            m = top
        hard = hard_value(m, z, total, pivot, label_logit, V, smoothing, z_loss, SMOOTH)
        hard = tl.where(active, tl.where(known, hard, float("nan")), 0.0)
        highest, logsum = log_normaliser(m, z)
        highest = tl.where(active, highest, 0.0)
        # An id outside the vocabulary makes its own row NaN, the gradient included.
        logsum = tl.where(active, tl.where(known, logsum, float("nan")), 0.0)
    tl.store(saved + HARD_MAX, highest)
    tl.store(saved + HARD_LOGSUM, logsum)
    tl.store(saved + HARD_TERM, hard)
    return hard


@triton.jit
def conclude(
    row, weight, alpha, temperature, shares, student, teachers, student_row, target, state, loss,
    V, shift, smoothing, z_loss,
    KIND: tl.constexpr, SQUARED: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr,
    WITHOUT: tl.constexpr,
):  # fmt: skip
    """A row's state and, unless its divergence takes another pass, its loss, from its merged numbers."""
    TEACHERS: tl.constexpr = len(teachers)
    ms, zs, m1, z1, total, best = student
    saved = state + row.to(tl.int64) * (FIRST_TEACHER + TEACHER_COLUMNS * TEACHERS)
    counts = weight != 0
    tl.store(saved + WEIGHT, weight)

    hard = conclude_hard(
        saved, counts & (alpha != 0), m1, z1, total, student_row, target, row, V, smoothing, z_loss,
        HARD, SMOOTH, WITHOUT,
    )  # fmt: skip
    soft = tl.zeros([], tl.float32)
    active = counts & (alpha != 1)
    if TEACHERS > 0:
        highest, logsum = log_normaliser(ms, zs, WITHOUT)
        tl.store(saved + STUDENT_MAX, tl.where(active, highest, 0.0))
        tl.store(saved + STUDENT_LOGSUM, tl.where(active, logsum, 0.0))
    else:
        tl.store(saved + STUDENT_MAX, 0.0)
        tl.store(saved + STUDENT_LOGSUM, 0.0)
    for k in tl.static_range(TEACHERS):
        mt, zt, sum_a, extent, _ = teachers[k]
        taught = active & (shares[k] != 0)
        columns = saved + FIRST_TEACHER + TEACHER_COLUMNS * k
        highest, logsum = log_normaliser(mt, zt, WITHOUT)
        looked_at = active if WITHOUT else taught
        tl.store(columns, tl.where(looked_at, highest, 0.0))
        tl.store(columns + 1, tl.where(looked_at, logsum, 0.0))
        if KIND != "two_pass":
            value, omega = one_pass_value(ms, zs, mt, zt, sum_a, extent, KIND)
            if SQUARED:
                value *= temperature * temperature
            soft += tl.where(taught, shares[k] * value, 0.0)
            tl.store(columns + 2, tl.where(looked_at, omega, 0.0))
    if KIND != "two_pass":
        tl.store(saved + SOFT_TERM, soft)
        tl.store(loss + row, weight * (alpha * hard + (1 - alpha) * soft))
    conclude_agreement(saved, counts, row, best, teachers, target, shares, shift, AGREE)


@triton.jit
def conclude_agreement(saved, counts, row, best, teachers, target, shares, shift, AGREE: tl.constexpr):
    labelled = tl.zeros([], tl.float32)
    taught = tl.zeros([], tl.float32)
    if AGREE:
        if target is not None:
            labelled = (counts & (tl.load(target + row) == best - shift)).to(tl.float32)
        for k in tl.static_range(len(teachers)):
            taught += tl.where(counts & (teachers[k][4] == best), shares[k], 0.0)
    tl.store(saved + TARGET_AGREES, labelled)
    tl.store(saved + TEACHER_AGREES, taught)


@triton.jit(**FREE)
def statistics(
    student, student_stride, teacher, teacher_stride, others, other_strides, target, row_weight,
    alpha_rows, alpha, temperature_rows, temperature, stretch_rows, teacher_temperature_rows, teacher_temperatures,
    share_rows, shares, state, loss, partials,
    V, shared, chunk, parts, ignore_index, smoothing, z_loss,
    KIND: tl.constexpr, SQUARED: tl.constexpr, HARD: tl.constexpr, SAME: tl.constexpr, BEYOND: tl.constexpr,
    SMOOTH: tl.constexpr, AGREE: tl.constexpr, WITHOUT: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Kernel 1. SAME: the hard term's softmax is the soft term's (T = 1 and no id beyond the shared ones).

    BEYOND: the student's ids from ``shared`` to V are read too, without a teacher. WITHOUT: the target is left out of
    the soft term.
    """
    TEACHERS: tl.constexpr = len(shares)
    row, part = tl.program_id(0), tl.program_id(1)
    weight = counted_weight(row_weight, target, ignore_index, row)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    pivot = tl.zeros([], tl.float32)
    if SMOOTH:
        _, _, _, pivot = label_of(student_row, target, row, V)
    s = aligned(student_row, shift, K)
    t = teacher_rows(teacher, teacher_stride, others, other_strides, row, shift, K)
    # A row that does not count is not read.
    read = (weight != 0).to(tl.int32)
    c = scale_of(temperature_rows, temperature, stretch_rows, row)
    scales = scales_of(teacher_temperature_rows, teacher_temperatures, row)
    running = no_student(R)
    soft = (tl.zeros([], tl.float32), tl.zeros([], tl.float32))
    summaries = ()
    absent = -1
    if WITHOUT:
        absent = position_of(target, row, shift, V)

    if TEACHERS > 0:
        teachers = no_teachers(TEACHERS, R, KIND)
        first, last = part_of(part, chunk, shift, shift + shared * read)
        body, tail, edges = cut(first, last, R, K, U)
        for e in range(edges):
            i = edge(e, first, tail, R, K)
            tiles = load_edge(s, i, first, last, R, K)
            running, teachers = see_both(
                running, teachers, tiles, load_edges(t, i, first, last, R, K), absent, c, scales, pivot,
                i, first, last, R, K, KIND, HARD and not SAME, SMOOTH, AGREE, True, WITHOUT,
            )  # fmt: skip
        for i in tl.range(body, tail, R * K * U, num_stages=1):
            running, teachers = see_both(
                running, teachers, load_step(s, i, R, K, U), load_steps(t, i, R, K, U), absent, c, scales, pivot,
                i, first, last, R, K, KIND, HARD and not SAME, SMOOTH, AGREE, False, WITHOUT,
            )  # fmt: skip
        for k in tl.static_range(TEACHERS):
            summaries = summaries + (merged_teacher(teachers[k], scales[k], running[0], c, KIND),)
        soft = merged(running[0], running[1], c)

    if BEYOND:
        first, last = part_of(part, chunk, shift + shared * read, shift + V * read)
        body, tail, edges = cut(first, last, R, K, U)
        for e in range(edges):
            i = edge(e, first, tail, R, K)
            tiles = load_edge(s, i, first, last, R, K)
            running = see_student(running, tiles, c, pivot, i, first, last, R, K, False, HARD, SMOOTH, AGREE, True)
        for i in tl.range(body, tail, R * K * U, num_stages=1):
            tiles = load_step(s, i, R, K, U)
            running = see_student(running, tiles, c, pivot, i, first, last, R, K, False, HARD, SMOOTH, AGREE, False)

    if SAME:
        hard = soft
    else:
        hard = merged(running[0], running[2], LOG2E)
    total, best = tl.sum(running[3], axis=0), merged_best(running[0], running[4])
    summary = (soft[0], soft[1], hard[0], hard[1], total, best)
    if partials is None:
        conclude(
            row, weight, number(alpha_rows, alpha, row), temperature_of(temperature_rows, temperature, row),
            shares_of(share_rows, shares, row), summary, summaries, student_row, target, state, loss, V, shift,
            smoothing, z_loss, KIND, SQUARED, HARD, SMOOTH, AGREE, WITHOUT,
        )  # fmt: skip
    else:
        place = partials + (row.to(tl.int64) * parts + part) * (STUDENT_PARTIALS + TEACHER_PARTIALS * TEACHERS)
        store_all(place, summary)
        for k in tl.static_range(TEACHERS):
            store_all(place + STUDENT_PARTIALS + TEACHER_PARTIALS * k, summaries[k])


@triton.jit
def load_parts(pointer, row, parts, column, WIDTH: tl.constexpr, other, MAX: tl.constexpr):
    part = tl.arange(0, MAX)
    return tl.load(pointer + (row.to(tl.int64) * parts + part) * WIDTH + column, mask=part < parts, other=other)


@triton.jit(**FREE)
def merge_statistics(
    student, student_stride, target, row_weight,
    alpha_rows, alpha, temperature_rows, temperature, stretch_rows, teacher_temperature_rows, teacher_temperatures,
    share_rows, shares, state, loss, partials, V, parts, ignore_index, smoothing, z_loss,
    KIND: tl.constexpr, SQUARED: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr,
    WITHOUT: tl.constexpr, K: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """The parts of a row, as kernel 1 left them, merged by the rule that merged its threads."""
    TEACHERS: tl.constexpr = len(shares)
    WIDTH: tl.constexpr = STUDENT_PARTIALS + TEACHER_PARTIALS * TEACHERS
    row = tl.program_id(0)
    weight = counted_weight(row_weight, target, ignore_index, row)
    student_row = first_logit(student, row, student_stride)
    c = scale_of(temperature_rows, temperature, stretch_rows, row)
    scales = scales_of(teacher_temperature_rows, teacher_temperatures, row)
    m = load_parts(partials, row, parts, 0, WIDTH, LOWEST, MAX)
    z = load_parts(partials, row, parts, 1, WIDTH, 0.0, MAX)
    m1 = load_parts(partials, row, parts, 2, WIDTH, LOWEST, MAX)
    hard = merged(m1, load_parts(partials, row, parts, 3, WIDTH, 0.0, MAX), LOG2E)
    total = tl.sum(load_parts(partials, row, parts, 4, WIDTH, 0.0, MAX), axis=0)
    best = merged_best(m1, load_parts(partials, row, parts, 5, WIDTH, 0.0, MAX).to(tl.int32, bitcast=True))
    soft = merged(m, z, c)
    summary = (soft[0], soft[1], hard[0], hard[1], total, best)
    summaries = ()
    for k in tl.static_range(TEACHERS):
        j = STUDENT_PARTIALS + TEACHER_PARTIALS * k
        absent = 0.0 if KIND == "mse" else -float("inf")
        teacher = (
            load_parts(partials, row, parts, j, WIDTH, LOWEST, MAX),
            load_parts(partials, row, parts, j + 1, WIDTH, 0.0, MAX),
            load_parts(partials, row, parts, j + 2, WIDTH, 0.0, MAX),
            load_parts(partials, row, parts, j + 3, WIDTH, absent, MAX),
            load_parts(partials, row, parts, j + 4, WIDTH, 0.0, MAX).to(tl.int32, bitcast=True),
        )
        summaries = summaries + (merged_teacher(teacher, scales[k], m, c, KIND),)
    conclude(
        row, weight, number(alpha_rows, alpha, row), temperature_of(temperature_rows, temperature, row),
        shares_of(share_rows, shares, row), summary, summaries, student_row, target, state, loss,
        V, misalignment(student_row, K), smoothing, z_loss, KIND, SQUARED, HARD, SMOOTH, AGREE, WITHOUT,
    )  # fmt: skip
