# ruff: noqa: SIM108 - Triton takes a branch at compile time where it can.
"""The kernel of the matrix products of which the device alone knows how many rows count.

A program owns one tile of the result: nothing is added atomically, and equal inputs give equal bits. There are programs
for all rows; those that the count leaves without work have the highest numbers and return at once.

The loop goes over whole blocks of the sum without a mask along it, and the ragged rest is a step of its own, so that
any length is read 16 bytes at a time as long as rows begin at multiples of 16 bytes. Across the sum the masks cover
whole groups of 16 bytes: at most 14 foreign bytes are read, never across a 16-byte line, and nothing that comes of them
is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import INTERPRETED

# For the decorator: one binary serves every number of rows, vocabulary, hidden size, stride and alignment.
FREE = {
    "do_not_specialize": [
        "left_row", "left_column", "right_row", "right_column", "out_row", "M", "N", "K",
    ],
    "do_not_specialize_on_alignment": ["left", "right", "bias", "out", "count"],
}  # fmt: skip


@triton.jit
def hinted(pointer, row, column, row_stride, column_stride, VECTOR: tl.constexpr, STRAIGHT: tl.constexpr):
    """Pointer to an element, and the strides, as the compiler can see them.

    ``STRAIGHT`` is the dimension of stride 1, the other's being a multiple of 16 bytes, or None if that is not so.
    """
    row_stride, column_stride = row_stride.to(tl.int64), column_stride.to(tl.int64)
    if STRAIGHT == 0:
        row_stride, column_stride = tl.full([], 1, tl.int64), column_stride // VECTOR * VECTOR
    if STRAIGHT == 1:
        row_stride, column_stride = row_stride // VECTOR * VECTOR, tl.full([], 1, tl.int64)
    first = pointer + (row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride)
    if STRAIGHT is not None:
        first = tl.multiple_of(first, 16)
    return first, row_stride, column_stride


@triton.jit
def across(first, limit, SIZE: tl.constexpr, STRAIGHT: tl.constexpr):
    """Rows of left or columns of right, counted from ``first``. Past the limit the last one stands in.

    Neighbours that are read together have to stay neighbours: those are masked.
    """
    i = tl.arange(0, SIZE)
    return i if STRAIGHT else tl.minimum(i, limit - 1 - first)


@triton.jit
def read(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(pointers, mask=inside, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def place(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Down a group of rows of tiles, then on to the next column: neighbours in time share operands in the L2 cache."""
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def multiplied(left, right, total, WIDE: tl.constexpr):
    if WIDE or INTERPRETED:  # which multiplies the bits of bfloat16 as if they were integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def finish(
    first, row_stride, column_stride, total, rows, limit,
    ADDS: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes a tile in four parts, of which one at a time has what is in memory beside it in registers.

    ``limit``: how many of its columns there are, all if WHOLE.
    """
    left, right = halves(total, BM, BN)
    parts = halves(left, BM, BN // 2) + halves(right, BM, BN // 2)
    for i in tl.static_range(4):
        columns = tl.arange(0, BN // 4) + i * (BN // 4)
        # In one sum, since the compiler forgets the pointer's alignment when it joins two.
        at = first + (tl.arange(0, BM)[:, None] * row_stride + columns[None, :] * column_stride)
        inside = rows
        if not WHOLE:
            inside = rows & (columns < limit)[None, :]
        part = parts[i]
        if ADDS:
            part += tl.load(at, mask=inside, other=0.0)
        tl.store(at, part, mask=inside)


@triton.jit(**FREE)
def product(
    left, left_row, left_column, right, right_row, right_column, bias, out, out_row, count, scale, M, N, K,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, OUT: tl.constexpr, ADDS: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[:count] = scale * (left[:count] @ right + bias). ADDS: out += scale * left[:, :count] @ right[:count]."""
    counted = tl.load(count).to(tl.int32)
    if ADDS:
        K = tl.minimum(K, counted)
        M = tl.where(K > 0, M, 0)
    else:
        M = tl.minimum(M, counted)
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    if program >= row_tiles * column_tiles:
        return
    row, column = place(program, row_tiles, column_tiles, GROUP)
    m, n = row * BM, column * BN

    LEFT_VECTOR: tl.constexpr = 128 // left.dtype.element_ty.primitive_bitwidth
    RIGHT_VECTOR: tl.constexpr = 128 // right.dtype.element_ty.primitive_bitwidth
    zero = row * 0
    x, x_row, x_column = hinted(left, m, zero, left_row, left_column, LEFT_VECTOR, LEFT)
    y, y_row, y_column = hinted(right, zero, n, right_row, right_column, RIGHT_VECTOR, RIGHT)
    i, j, k = across(m, M, BM, LEFT == 0), across(n, N, BN, RIGHT == 1), tl.arange(0, BK)
    x_tile = i[:, None] * x_row + k[None, :] * x_column
    y_tile = k[:, None] * y_row + j[None, :] * y_column
    rows, columns = (m + i < M)[:, None], (n + j < N)[None, :]
    if LEFT == 0:
        rows = (m + i < (M + LEFT_VECTOR - 1) // LEFT_VECTOR * LEFT_VECTOR)[:, None]
    if RIGHT == 1:
        columns = (n + j < (N + RIGHT_VECTOR - 1) // RIGHT_VECTOR * RIGHT_VECTOR)[None, :]

    total = tl.zeros((BM, BN), tl.float32)
    whole = K // BK * BK
    for _ in tl.range(0, whole, BK):
        total = multiplied(read(x + x_tile, rows, LEFT == 0), read(y + y_tile, columns, RIGHT == 1), total, WIDE)
        x += BK * x_column
        y += BK * y_row
    if whole < K:
        rest = k < K - whole
        x_rest, y_rest = rest[None, :], rest[:, None]
        if LEFT == 0:
            x_rest = rows & x_rest
        if RIGHT == 1:
            y_rest = columns & y_rest
        total = multiplied(read(x + x_tile, x_rest, True), read(y + y_tile, y_rest, True), total, WIDE)

    if bias is not None:
        ids = n + tl.arange(0, BN)
        total += tl.load(bias + ids, mask=ids < N, other=0.0).to(tl.float32)[None, :]
    total *= scale
    at, out_row, out_column = hinted(out, m, n, out_row, zero + 1, 4, OUT)
    rows = (m + tl.arange(0, BM) < M)[:, None]
    if n + BN <= N:  # a mask of columns would take the vectors apart
        finish(at, out_row, out_column, total, rows, N - n, ADDS, True, BM, BN)
    else:
        finish(at, out_row, out_column, total, rows, N - n, ADDS, False, BM, BN)
