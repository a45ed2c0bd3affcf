"""Gradients of queries and of keys from attention scores that are made again, in tiles as those of the values."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_values import FREE, counting, head_of, numbers_of, piece, pieces, scores, seen_keys
from .rows import LOG2E, narrow


@triton.jit
def usable(x):
    """A NaN or an infinity as 0: of a token that what is 0 beside it hides. Whoever sees it is NaN without it."""
    return tl.where(x - x == 0, x, 0.0)


@triton.jit
def add_product(slopes, x, total):
    """total + slopes @ x, as exact as float32. A 16-bit x is a TF32 number; of the slopes, the first 11 digits and the
    rest are two of them."""
    if x.dtype == tl.float32:
        total = tl.dot(slopes, x, total, input_precision="ieee")
    else:
        wide = x.to(tl.float32)
        first = (slopes.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(first, wide, total, input_precision="tf32")
        total = tl.dot(slopes - first, wide, total, input_precision="tf32")
    return total


@triton.jit
def row_numbers(numbers, weight, at, inside, rows, scale, teacher_scale):
    """Of rows: the two models' maxima and logarithms of sums, in base 2, and what multiplies the row's loss."""
    student_max = tl.load(numbers + at, mask=inside, other=0.0)
    student_log = tl.load(numbers + rows + at, mask=inside, other=0.0) * LOG2E
    teacher_max = tl.load(numbers + 2 * rows + at, mask=inside, other=0.0)
    teacher_log = tl.load(numbers + 3 * rows + at, mask=inside, other=0.0) * LOG2E
    weights = tl.load(weight + at, mask=inside, other=0.0) * scale
    return student_max, student_log, teacher_max, teacher_log, weights, scale * LOG2E, teacher_scale * LOG2E


@triton.jit
def slopes_of(s, t, row):
    """weight * (q - p)."""
    student_max, student_log, teacher_max, teacher_log, weights, student_scale, teacher_scale = row
    q = tl.exp2((s - student_max[:, None]) * student_scale - student_log[:, None])
    p = tl.exp2((t - teacher_max[:, None]) * teacher_scale - teacher_log[:, None])
    return (q - p) * weights[:, None]


@triton.jit
def write(
    total, out, head, token, inside, token_stride, first, D: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    mask = inside[:, None]
    if D % BD != 0:
        mask = mask & (first + tl.arange(0, BD) < D)[None, :]
    at = numbers_of(out, head, token, token_stride, first, BD, ALIGNED)
    tl.store(at, narrow(total, out.dtype.element_ty), mask=mask)


@triton.jit
def rows_that_see(first, queries, counts, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of the keys from ``first`` on: where the rows begin that see any, and where those that see all begin and end.

    The tiles before and after the latter are ragged; where rows are masked all are.
    """
    begin, whole, end = 0, 0, queries // BM * BM
    if CAUSAL:
        begin = first // BM * BM
        whole = tl.minimum(tl.cdiv(first + BN - 1, BM) * BM, queries)
    end = tl.maximum(whole, end)
    if counts is not None:
        end = whole
    return begin, whole, end


@triton.jit(**FREE)
def query_gradients(
    q_s, q_s_batch, q_s_head, q_s_token, k_s, k_s_batch, k_s_head, k_s_token,
    q_t, q_t_batch, q_t_head, q_t_token, k_t, k_t_batch, k_t_head, k_t_token,
    counts, key_mask, numbers, weight, out, out_batch, out_head, out_token,
    scale, teacher_scale, heads, student_sharing, teacher_sharing, queries, keys,
    CAUSAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BO: tl.constexpr,
    ALIGNED: tl.constexpr, HELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BO numbers of the gradients of BM queries: the sum over keys of slope times key."""
    blocks, slices = tl.cdiv(queries, BM), (D + BO - 1) // BO
    program = tl.program_id(0) // slices
    part = tl.program_id(0) % slices * BO
    batch, head = program // blocks // heads, program // blocks % heads
    first = (blocks - 1 - program % blocks) * BM
    row = first + tl.arange(0, BM)
    counts_here = counting(counts, batch, row, queries)
    query = tl.minimum(row, queries - 1)
    own_s = (q_s, head_of(batch, head, q_s_batch, q_s_head), query, counts_here, q_s_token)
    own_t = (q_t, head_of(batch, head, q_t_batch, q_t_head), query, counts_here, q_t_token)
    held_s, held_t = pieces(own_s, D, BD, ALIGNED, HELD), pieces(own_t, E, BE, ALIGNED, HELD)
    head_s = head_of(batch, head // student_sharing, k_s_batch, k_s_head)
    head_t = head_of(batch, head // teacher_sharing, k_t_batch, k_t_head)
    rows = tl.num_programs(0).to(tl.int64) // slices // blocks * queries
    at = (program // blocks).to(tl.int64) * queries + query
    mine = row_numbers(numbers, weight, at, row < queries, rows, scale, teacher_scale)

    total = tl.zeros((BM, BO), tl.float32)
    end, whole = keys, keys // BN * BN
    if CAUSAL:
        end, whole = tl.minimum(keys, first + BM), first // BN * BN
    if counts is not None:
        whole = 0
    for n in tl.range(0, whole, BN):
        key = n + tl.arange(0, BN)
        s = scores(held_s, own_s, (k_s, head_s, key, key, k_s_token), D, BD, ALIGNED, False, False, BM, BN)
        t = scores(held_t, own_t, (k_t, head_t, key, key, k_t_token), E, BE, ALIGNED, False, False, BM, BN)
        right = piece(k_s, head_s, key, part, key, k_s_token, D, BO, ALIGNED, False)
        total = add_product(slopes_of(s, t, mine), right, total)
    for n in tl.range(whole, end, BN, num_stages=1):
        key = n + tl.arange(0, BN)
        present = seen_keys(key_mask, batch, key, keys)
        s = scores(held_s, own_s, (k_s, head_s, key, present, k_s_token), D, BD, ALIGNED, True, False, BM, BN)
        t = scores(held_t, own_t, (k_t, head_t, key, present, k_t_token), E, BE, ALIGNED, True, False, BM, BN)
        seen = present[None, :] & counts_here[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        right = usable(piece(k_s, head_s, key, part, present, k_s_token, D, BO, ALIGNED, True))
        total = add_product(tl.where(seen, slopes_of(s, t, mine), 0.0), right, total)
    here = head_of(batch, head, out_batch, out_head)
    write(total, out, here, row, row < queries, out_token, part, D, BO, ALIGNED)


@triton.jit(**FREE)
def key_gradients(
    q_s, q_s_batch, q_s_head, q_s_token, k_s, k_s_batch, k_s_head, k_s_token,
    q_t, q_t_batch, q_t_head, q_t_token, k_t, k_t_batch, k_t_head, k_t_token,
    counts, key_mask, numbers, weight, out, out_batch, out_head, out_token,
    beside, beside_batch, beside_head, beside_token,
    scale, teacher_scale, heads, student_sharing, teacher_sharing, queries, keys,
    CAUSAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BO: tl.constexpr,
    ALIGNED: tl.constexpr, HELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BO numbers of the gradients of BN keys: the sum over the rows of all heads that share them of slope times query.

    ``beside``: what is added to them.
    """
    blocks, slices, groups = tl.cdiv(keys, BN), (D + BO - 1) // BO, heads // student_sharing
    program = tl.program_id(0) // slices
    part = tl.program_id(0) % slices * BO
    batch, group = program // blocks // groups, program // blocks % groups
    first = program % blocks * BN
    key = first + tl.arange(0, BN)
    present = seen_keys(key_mask, batch, key, keys)
    own_s = (k_s, head_of(batch, group, k_s_batch, k_s_head), key, present, k_s_token)
    held_s = pieces(own_s, D, BD, ALIGNED, HELD)
    rows = tl.num_programs(0).to(tl.int64) // slices // blocks * student_sharing * queries

    total = tl.zeros((BN, BO), tl.float32)
    begin, whole, end = rows_that_see(first, queries, counts, CAUSAL, BM, BN)
    for i in range(student_sharing):
        head = group * student_sharing + i
        head_s = head_of(batch, head, q_s_batch, q_s_head)
        head_t = head_of(batch, head, q_t_batch, q_t_head)
        own_t = (k_t, head_of(batch, head // teacher_sharing, k_t_batch, k_t_head), key, present, k_t_token)
        held_t = pieces(own_t, E, BE, ALIGNED, HELD)
        mine = (batch * heads + head).to(tl.int64) * queries
        for m in tl.range(whole, end, BM):
            row = m + tl.arange(0, BM)
            s = scores(held_s, own_s, (q_s, head_s, row, row, q_s_token), D, BD, ALIGNED, False, True, BM, BN)
            t = scores(held_t, own_t, (q_t, head_t, row, row, q_t_token), E, BE, ALIGNED, False, True, BM, BN)
            theirs = row_numbers(numbers, weight, mine + row, row < queries, rows, scale, teacher_scale)
            right = piece(q_s, head_s, row, part, row, q_s_token, D, BO, ALIGNED, False)
            total = add_product(tl.trans(slopes_of(s, t, theirs)), right, total)
        diagonal = tl.cdiv(whole - begin, BM)
        for j in tl.range(0, diagonal + tl.cdiv(queries - end, BM), num_stages=1):
            m = tl.where(j < diagonal, begin + j * BM, end + (j - diagonal) * BM)
            row = m + tl.arange(0, BM)
            counts_here = counting(counts, batch, row, queries)
            s = scores(held_s, own_s, (q_s, head_s, row, counts_here, q_s_token), D, BD, ALIGNED, True, True, BM, BN)
            t = scores(held_t, own_t, (q_t, head_t, row, counts_here, q_t_token), E, BE, ALIGNED, True, True, BM, BN)
            theirs = row_numbers(numbers, weight, mine + row, row < queries, rows, scale, teacher_scale)
            seen = present[None, :] & counts_here[:, None]
            if CAUSAL:
                seen = seen & (key[None, :] <= row[:, None])
            right = usable(piece(q_s, head_s, row, part, counts_here, q_s_token, D, BO, ALIGNED, True))
            total = add_product(tl.trans(tl.where(seen, slopes_of(s, t, theirs), 0.0)), right, total)
    inside = key < keys
    if beside is not None:
        others = head_of(batch, group, beside_batch, beside_head)
        total += piece(beside, others, key, part, inside, beside_token, D, BO, ALIGNED, True)
    write(total, out, head_of(batch, group, out_batch, out_head), key, inside, out_token, part, D, BO, ALIGNED)
