# ruff: noqa: RUF005, SIM108 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""What the events of a sparse teacher are worth to the student: its k ids, and the tail, which is any other id.

1. ``mark_named`` leaves a byte for every K neighbours of a row, with a bit for each that the teacher names.
2. ``tail_statistics`` reads the student once, beside those bytes: the numbers of ``statistics``, of the others alone.
   So the tail has all its digits where the named ids leave it next to nothing.
3. ``gather_events``, one small program a row, merges the parts and the named logits, and leaves state and events.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_values import conclude_hard, counted_weight, label_of, load_parts, store_all
from .rows import (
    FIRST_TEACHER,
    FREE,
    LOG2E,
    LOWEST,
    NOWHERE,
    SOFT_TERM,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    STUDENT_PARTIALS,
    TARGET_AGREES,
    TEACHER_AGREES,
    WEIGHT,
    aligned,
    cut,
    edge,
    first_logit,
    load_edge,
    load_step,
    misalignment,
    number,
    part_of,
    temperature_of,
)
from .statistics import log_normaliser, merged, merged_best, no_student, see_student, summed


@triton.jit
def load_ids(indices, row, j, count, shared, B: tl.constexpr):
    """B entries from j on: where they are, their ids, and which of these are ids at all."""
    entry = j + tl.arange(0, B)
    id = tl.load(indices + row.to(tl.int64) * count + entry, mask=entry < count, other=-1)
    known = (id >= 0) & (id < shared)
    return entry, id, known, tl.where(known, id, 0).to(tl.int32)


@triton.jit(**FREE)
def mark_named(
    student, student_stride, indices, alpha_rows, alpha, marks, wrong, shared, count, words,
    K: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Kernel 1, for rows that may be soft. ``wrong``: an id is outside, or its bit was there before.

    Bits are set one by one, in no order: an or has none.
    """
    row = tl.program_id(0)
    shift = misalignment(first_logit(student, row, student_stride), K)
    mine = marks + row.to(tl.int64) * words
    found = tl.zeros([B], tl.int32)
    for j in range(0, tl.where(number(alpha_rows, alpha, row) != 1, count, 0), B):
        _, id, known, place = load_ids(indices, row, j, count, shared, B)
        place += shift
        bit = tl.full([B], 1, tl.int32) << (place // K % 4 * 8 + place % K)
        before = tl.atomic_or(mine + place // K // 4, bit, mask=known, sem="relaxed")
        outside = (id < -1) | (id >= shared)
        found |= (outside | (known & ((before & bit) != 0))).to(tl.int32)
    tl.store(wrong + row, tl.max(found, axis=0))


@triton.jit
def without_named(tiles, marks, i, last, R: tl.constexpr, K: tl.constexpr, EDGE: tl.constexpr):
    """The tiles at position i, with -inf at the named ids: probability 0."""
    others = ()
    for u in tl.static_range(len(tiles)):
        group = i // K + u * R + tl.arange(0, R)
        if EDGE:
            byte = tl.load(marks + group, mask=group * K < last, other=0)
        else:
            byte = tl.load(marks + group)
        bits = (byte.to(tl.int32)[:, None] >> tl.arange(0, K)[None, :]) & 1
        others = others + (tl.where(bits != 0, -float("inf"), tiles[u]),)
    return others


@triton.jit
def see_tail(
    student, tiles, marks, c, pivot, i, first, last,
    R: tl.constexpr, K: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One step of the running numbers of the others; the sum of logits alone is that of all."""
    others = without_named(tiles, marks, i, last, R, K, EDGE)
    m, z, z1, total, best = see_student(
        student, others, c, pivot, i, first, last, R, K, True, HARD, False, AGREE, EDGE
    )  # fmt: skip
    if SMOOTH:
        total = summed(total, tiles, pivot, i, first, last, R, K, EDGE)
    return m, z, z1, total, best


@triton.jit(**FREE)
def tail_statistics(
    student, student_stride, marks, target, row_weight, temperature_rows, temperature, partials,
    V, shared, chunk, parts, words, ignore_index,
    HARD: tl.constexpr, SAME: tl.constexpr, BEYOND: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Kernel 2. SAME and BEYOND are those of ``statistics``; a row that does not count is not read."""
    row, part = tl.program_id(0), tl.program_id(1)
    read = (counted_weight(row_weight, target, ignore_index, row) != 0).to(tl.int32)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    s = aligned(student_row, shift, K)
    mine = (marks + row.to(tl.int64) * words).to(tl.pointer_type(tl.uint8))
    pivot = tl.zeros([], tl.float32)
    if SMOOTH:
        _, _, _, pivot = label_of(student_row, target, row, V)
    c = LOG2E / temperature_of(temperature_rows, temperature, row)
    running = no_student(R)

    first, last = part_of(part, chunk, shift, shift + shared * read)
    body, tail, edges = cut(first, last, R, K, U)
    for e in range(edges):
        i = edge(e, first, tail, R, K)
        x = load_edge(s, i, first, last, R, K)
        running = see_tail(running, x, mine, c, pivot, i, first, last, R, K, HARD and not SAME, SMOOTH, AGREE, True)
    for i in tl.range(body, tail, R * K * U, num_stages=1):
        x = load_step(s, i, R, K, U)
        running = see_tail(running, x, mine, c, pivot, i, first, last, R, K, HARD and not SAME, SMOOTH, AGREE, False)
    soft = merged(running[0], running[1], c)

    if BEYOND:
        first, last = part_of(part, chunk, shift + shared * read, shift + V * read)
        body, tail, edges = cut(first, last, R, K, U)
        for e in range(edges):
            i = edge(e, first, tail, R, K)
            x = load_edge(s, i, first, last, R, K)
            running = see_student(running, x, c, pivot, i, first, last, R, K, False, HARD, SMOOTH, AGREE, True)
        for i in tl.range(body, tail, R * K * U, num_stages=1):
            x = load_step(s, i, R, K, U)
            running = see_student(running, x, c, pivot, i, first, last, R, K, False, HARD, SMOOTH, AGREE, False)

    hard = merged(running[0], running[2], LOG2E)
    total, best = tl.sum(running[3], axis=0), merged_best(running[0], running[4])
    place = partials + (row.to(tl.int64) * parts + part) * STUDENT_PARTIALS
    store_all(place, (soft[0], soft[1], hard[0], hard[1], total, best))


@triton.jit
def load_named(student_row, indices, row, j, count, shared, B: tl.constexpr):
    """B entries from j on, their logits (-inf where there is none), and their ids."""
    entry, _, known, id = load_ids(indices, row, j, count, shared, B)
    x = tl.load(student_row + id, mask=known, other=-float("inf")).to(tl.float32)
    return entry, x, id


@triton.jit
def see_named(student_row, indices, row, count, shared, shift, c, B: tl.constexpr):
    """max, sum at T, sum at 1, first position at the max, of the named ids."""
    m, z, z1, _total, best = no_student(B)
    for j in range(0, count, B):
        _, x, id = load_named(student_row, indices, row, j, count, shared, B)
        top = tl.maximum(m, x)
        z = z * tl.exp2((m - top) * c) + tl.exp2((x - top) * c)
        z1 = z1 * tl.exp2((m - top) * LOG2E) + tl.exp2((x - top) * LOG2E)
        here = tl.where(x == top, id + shift, NOWHERE)
        best = tl.where(x > m, here, tl.minimum(best, here))
        m = top
    top, z = merged(m, z, c)
    _, z1 = merged(m, z1, LOG2E)
    return top, z, z1, merged_best(m, best)


@triton.jit
def joined(m, z, other_m, other_z, c):
    """max and sum of two parts, as one."""
    top = tl.maximum(m, other_m)
    return top, z * tl.exp2((m - top) * c) + other_z * tl.exp2((other_m - top) * c)


@triton.jit
def finite_log(x):
    """-inf says that there is nothing: what is finite stays finite."""
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(**FREE)
def gather_events(
    student, student_stride, indices, favourite, wrong, target, row_weight,
    alpha_rows, alpha, temperature_rows, temperature, state, events, partials,
    V, shared, count, parts, ignore_index, smoothing, z_loss,
    HARD: tl.constexpr, SAME: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr,
    K: tl.constexpr, B: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Kernel 3."""
    row = tl.program_id(0)
    weight, a = counted_weight(row_weight, target, ignore_index, row), number(alpha_rows, alpha, row)
    counts = weight != 0
    soft = counts & (a != 1)
    named = tl.where(soft, count, 0)
    student_row = first_logit(student, row, student_stride)
    shift = misalignment(student_row, K)
    t = temperature_of(temperature_rows, temperature, row)
    c = LOG2E / t
    m1 = load_parts(partials, row, parts, 2, STUDENT_PARTIALS, LOWEST, MAX)
    tail_m = load_parts(partials, row, parts, 0, STUDENT_PARTIALS, LOWEST, MAX)
    tail_m, tail_z = merged(tail_m, load_parts(partials, row, parts, 1, STUDENT_PARTIALS, 0.0, MAX), c)
    total = tl.sum(load_parts(partials, row, parts, 4, STUDENT_PARTIALS, 0.0, MAX), axis=0)
    best = load_parts(partials, row, parts, 5, STUDENT_PARTIALS, 0.0, MAX).to(tl.int32, bitcast=True)
    best = merged_best(m1, best)
    hard_m, hard_z = merged(m1, load_parts(partials, row, parts, 3, STUDENT_PARTIALS, 0.0, MAX), LOG2E)

    m, z, z1, named_best = see_named(student_row, indices, row, named, shared, shift, c, B)
    top, mass = joined(tail_m, tail_z, m, z, c)
    best = tl.where(m > hard_m, named_best, tl.where(m < hard_m, best, tl.minimum(best, named_best)))
    if SAME:
        hard_m, hard_z = top, mass
    else:
        hard_m, hard_z = joined(hard_m, hard_z, m, z1, LOG2E)
    saved = state + row.to(tl.int64) * FIRST_TEACHER
    active = counts & (a != 0)
    conclude_hard(
        saved, active, hard_m, hard_z, total, student_row, target, row, V, smoothing, z_loss, HARD, SMOOTH
    )  # fmt: skip
    highest, logsum = log_normaliser(top, mass)
    tl.store(saved + WEIGHT, weight)
    tl.store(saved + SOFT_TERM, 0.0)
    tl.store(saved + STUDENT_MAX, tl.where(soft, highest, 0.0))
    tl.store(saved + STUDENT_LOGSUM, tl.where(soft, logsum, 0.0))
    store_agreement(saved, counts, row, best - shift, target, favourite, AGREE)

    spoilt = (tl.load(wrong + row) != 0) | (logsum != logsum)
    mine = events + row.to(tl.int64) * (count + 1)
    for j in range(0, count, B):
        entry, x, _ = load_named(student_row, indices, row, j, named, shared, B)
        event = tl.where(x == -float("inf"), x, finite_log((x - highest) / t - logsum))
        event = tl.where(soft, tl.where(spoilt, float("nan"), event), 0.0)
        tl.store(mine + entry, event, mask=entry < count)
    event = finite_log((tail_m - highest) / t + (tl.log(tail_z) - logsum))
    event = tl.where(tail_z == 0, -float("inf"), event)
    tl.store(mine + count, tl.where(soft, tl.where(spoilt, float("nan"), event), 0.0))


@triton.jit
def store_agreement(saved, counts, row, best, target, favourite, AGREE: tl.constexpr):
    labelled = tl.zeros([], tl.float32)
    taught = labelled
    if AGREE:
        if target is not None:
            labelled = (counts & (tl.load(target + row) == best)).to(tl.float32)
        if favourite is not None:
            taught = (counts & (tl.load(favourite + row) == best)).to(tl.float32)
    tl.store(saved + TARGET_AGREES, labelled)
    tl.store(saved + TEACHER_AGREES, taught)
