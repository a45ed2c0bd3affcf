# ruff: noqa: RUF005 - Triton knows no starred tuples.
"""Attention scores of a block of queries, a tile of keys at a time, and what a row of the loss adds up from them.

A program owns its rows, so that nothing is added atomically and equal inputs give equal bits. It walks first over tiles
that all of its rows see whole, without a mask, and then over the ragged ones, at the diagonal and at the end; where
tokens are masked all tiles are of the second kind. Sizes of heads are compiled in, as are their pieces of ``BD``
numbers that are multiplied at a time; numbers of tokens, heads and strides are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import multiplied
from .rows import LN2, LOG2E, LOWEST, clip

# For the decorators: one binary serves every batch, number of heads, of tokens, stride and alignment.
FREE = {
    "do_not_specialize": [
        "q_s_batch", "q_s_head", "q_s_token", "k_s_batch", "k_s_head", "k_s_token",
        "q_t_batch", "q_t_head", "q_t_token", "k_t_batch", "k_t_head", "k_t_token",
        "out_batch", "out_head", "out_token", "beside_batch", "beside_head", "beside_token",
        "heads", "student_sharing", "teacher_sharing", "queries", "keys",
    ],
    "do_not_specialize_on_alignment": [
        "q_s", "k_s", "q_t", "k_t", "counts", "key_mask", "state", "loss", "numbers", "weight", "out", "beside",
    ],
}  # fmt: skip


@triton.jit
def head_of(batch, head, batch_stride, head_stride):
    """Where a head begins."""
    return batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def numbers_of(pointer, head, token, token_stride, first, BD: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the numbers [first, first + BD) of some tokens. ALIGNED: a token begins at a multiple of 16 bytes."""
    begin, stride = pointer + head, token_stride.to(tl.int64)
    if ALIGNED:  # which the compiler sees only if it is said of a sum, and here
        begin = tl.multiple_of(begin, 16)
        VECTOR: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
        stride = stride // VECTOR * VECTOR
    return begin + (token.to(tl.int64)[:, None] * stride + (first + tl.arange(0, BD))[None, :])


@triton.jit
def piece(
    pointer, head, token, first, present, token_stride, D: tl.constexpr, BD: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The numbers [first, first + BD) of some tokens."""
    at = numbers_of(pointer, head, token, token_stride, first, BD, ALIGNED)
    inside = (first + tl.arange(0, BD) < D)[None, :]
    if MASKED:
        if D % BD == 0:
            x = tl.load(at, mask=present[:, None], other=0.0)
        else:
            x = tl.load(at, mask=present[:, None] & inside, other=0.0)
    elif D % BD == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=inside, other=0.0)
    return x


@triton.jit
def pieces(tokens, D: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr, HELD: tl.constexpr):
    """All of some tokens, to be held; none of them, if that would be too much."""
    pointer, head, token, present, token_stride = tokens
    held = ()
    if HELD:
        for c in tl.static_range((D + BD - 1) // BD):
            held = held + (piece(pointer, head, token, c * BD, present, token_stride, D, BD, ALIGNED, True),)
    return held


@triton.jit
def scores(
    held, own, others, D: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    OF_KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries times BN keys: those of ``own``, which may be held, and others, of which a piece at a time is read.

    Each kernel adds a score up from the same pieces in the same order, so that its bits are those that the row's
    maximum was taken of: else a probability of 1 would be one of 1 + 1e-7, and a gradient of 0 none.
    """
    own_pointer, own_head, own_token, own_present, own_stride = own
    pointer, head, token, present, token_stride = others
    total = tl.zeros((BM, BN), tl.float32)
    if len(held) > 0:
        for c in tl.static_range(len(held)):
            x = piece(pointer, head, token, c * BD, present, token_stride, D, BD, ALIGNED, MASKED)
            total = multiplied_as(held[c], x, total, OF_KEYS)
    else:
        for first in tl.range(0, D, BD):
            x = piece(pointer, head, token, first, present, token_stride, D, BD, ALIGNED, MASKED)
            y = piece(own_pointer, own_head, own_token, first, own_present, own_stride, D, BD, ALIGNED, True)
            total = multiplied_as(y, x, total, OF_KEYS)
    return total


@triton.jit
def multiplied_as(own, others, total, OF_KEYS: tl.constexpr):
    if OF_KEYS:
        total = multiplied(others, tl.trans(own), total, False)
    else:
        total = multiplied(own, tl.trans(others), total, False)
    return total


@triton.jit
def seen_keys(key_mask, batch, key, keys):
    """Which keys anybody sees."""
    present = key < keys
    if key_mask is not None:
        present = present & (tl.load(key_mask + batch.to(tl.int64) * keys + key, mask=present, other=0) != 0)
    return present


@triton.jit
def counting(counts, batch, query, queries):
    """Which rows count."""
    present = query < queries
    if counts is not None:
        present = present & (tl.load(counts + batch.to(tl.int64) * queries + query, mask=present, other=0) != 0)
    return present


@triton.jit
def fault_of(s, t):
    """NaN where a score is not finite: an infinite key may give -inf, which a sum of exponentials would not show."""
    return (s - s) + (t - t)


@triton.jit
def with_tile(sums, s, t, student_scale, teacher_scale):
    """Maxima, sums and the cross sum of ``statistics.py`` with a tile more; rows are the first dimension."""
    student_max, student_sum, teacher_max, teacher_sum, cross = sums
    student_top, teacher_top = tl.maximum(student_max, tl.max(s, 1)), tl.maximum(teacher_max, tl.max(t, 1))
    student_by = clip((student_max - student_top) * student_scale)
    teacher_by = clip((teacher_max - teacher_top) * teacher_scale)
    xs = clip((s - student_top[:, None]) * student_scale)
    xt = clip((t - teacher_top[:, None]) * teacher_scale)
    et = tl.exp2(xt)
    shrink = tl.exp2(teacher_by)
    cross = (cross + (teacher_by - student_by) * teacher_sum) * shrink + tl.sum(et * (xt - xs), 1)
    teacher_sum = teacher_sum * shrink + tl.sum(et, 1)
    student_sum = student_sum * tl.exp2(student_by) + tl.sum(tl.exp2(xs), 1)
    return student_top, student_sum, teacher_top, teacher_sum, cross


@triton.jit(**FREE)
def row_values(
    q_s, q_s_batch, q_s_head, q_s_token, k_s, k_s_batch, k_s_head, k_s_token,
    q_t, q_t_batch, q_t_head, q_t_token, k_t, k_t_batch, k_t_head, k_t_token,
    counts, key_mask, state, loss, scale, teacher_scale, heads, student_sharing, teacher_sharing, queries, keys,
    CAUSAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ALIGNED: tl.constexpr, HELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The loss and the state of BM rows."""
    blocks = tl.cdiv(queries, BM)
    program = tl.program_id(0)
    batch, head = program // blocks // heads, program // blocks % heads
    first = (blocks - 1 - program % blocks) * BM  # under a causal mask the last rows have the most to do
    row = first + tl.arange(0, BM)
    counts_here = counting(counts, batch, row, queries)
    query = tl.minimum(row, queries - 1)
    own_s = (q_s, head_of(batch, head, q_s_batch, q_s_head), query, counts_here, q_s_token)
    own_t = (q_t, head_of(batch, head, q_t_batch, q_t_head), query, counts_here, q_t_token)
    held_s, held_t = pieces(own_s, D, BD, ALIGNED, HELD), pieces(own_t, E, BE, ALIGNED, HELD)
    head_s = head_of(batch, head // student_sharing, k_s_batch, k_s_head)
    head_t = head_of(batch, head // teacher_sharing, k_t_batch, k_t_head)
    student_scale, teacher_scale = scale * LOG2E, teacher_scale * LOG2E

    zero = tl.zeros([BM], tl.float32)
    sums, fault = (zero + LOWEST, zero, zero + LOWEST, zero, zero), zero
    end, whole = keys, keys // BN * BN
    if CAUSAL:
        end, whole = tl.minimum(keys, first + BM), first // BN * BN
    if counts is not None:
        whole = 0
    for n in tl.range(0, whole, BN):
        key = n + tl.arange(0, BN)
        s = scores(held_s, own_s, (k_s, head_s, key, key, k_s_token), D, BD, ALIGNED, False, False, BM, BN)
        t = scores(held_t, own_t, (k_t, head_t, key, key, k_t_token), E, BE, ALIGNED, False, False, BM, BN)
        sums = with_tile(sums, s, t, student_scale, teacher_scale)
        fault += tl.sum(fault_of(s, t), 1)
    for n in tl.range(whole, end, BN, num_stages=1):
        key = n + tl.arange(0, BN)
        present = seen_keys(key_mask, batch, key, keys)
        s = scores(held_s, own_s, (k_s, head_s, key, present, k_s_token), D, BD, ALIGNED, True, False, BM, BN)
        t = scores(held_t, own_t, (k_t, head_t, key, present, k_t_token), E, BE, ALIGNED, True, False, BM, BN)
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        fault += tl.sum(tl.where(seen, fault_of(s, t), 0.0), 1)
        s, t = tl.where(seen, s, -float("inf")), tl.where(seen, t, -float("inf"))
        sums = with_tile(sums, s, t, student_scale, teacher_scale)

    student_max, student_sum, teacher_max, teacher_sum, cross = sums
    student_sum, teacher_sum = student_sum + fault, teacher_sum + fault
    value = (cross / teacher_sum - tl.log2(teacher_sum / student_sum)) * LN2
    inside = row < queries
    at = (program // blocks).to(tl.int64) * queries + row
    tl.store(loss + at, tl.where(counts_here, value, 0.0), mask=inside)
    columns = (zero + 1, student_max, tl.log(student_sum), teacher_max, tl.log(teacher_sum))
    for i in tl.static_range(COLUMNS):
        column = tl.where(counts_here, columns[i], 0.0)
        tl.store(state + at * COLUMNS + i, column.to(tl.float64), mask=inside)
