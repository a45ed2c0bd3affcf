# ruff: noqa: RUF005, SIM108 - Triton knows no starred tuples, and takes a branch at compile time where it can.
"""What the row kernels share: 16-byte loads from rows of any length and alignment, and exact arithmetic in base 2.

A program walks over one row, or over one of its parts, in tiles of R x K: K neighbours are 16 bytes of one thread, so
a reduction over K needs no other thread. Masking every tile by ``column < V`` would cost the vector loads (the
compiler cannot see that a mask is constant over 16 bytes unless V is a known multiple), so the ragged ends of a range
are peeled into masked tiles and the steps in between carry no mask. Ends are read as whole aligned groups: at most 14
foreign bytes, never across a 16-byte line, and dropped in registers.

Positions count from the row's last 16-byte boundary at or before its first logit, which stands at ``shift``.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Running maxima start at the lowest finite number: infinities would meet as inf - inf in a row's masked logits.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Exponents saturate here: far below any probability, and their differences, times a sum, still fit in a float.
FAR = tl.constexpr(-1.0e30)
# A logit below is a mask, as -inf is, where logits are standardised.
MASK = tl.constexpr(-1.0e30)
# A log-sum that makes every probability 0: it stands in where a term has weight 0.
ABSENT = tl.constexpr(1.0e30)
NOWHERE = tl.constexpr(2**31 - 1)
MAX_PARTS = 32  # of a row

# Columns of the state, as the contract of the callers has them.
WEIGHT = tl.constexpr(0)
HARD_TERM = tl.constexpr(1)
SOFT_TERM = tl.constexpr(2)
STUDENT_MAX = tl.constexpr(3)
STUDENT_LOGSUM = tl.constexpr(4)
HARD_MAX = tl.constexpr(5)
HARD_LOGSUM = tl.constexpr(6)
TARGET_AGREES = tl.constexpr(7)
TEACHER_AGREES = tl.constexpr(8)
FIRST_TEACHER = tl.constexpr(9)
TEACHER_COLUMNS = tl.constexpr(3)

# Columns of a partial row: the student's running numbers, then each teacher's.
STUDENT_PARTIALS = tl.constexpr(6)
TEACHER_PARTIALS = tl.constexpr(5)

# For the kernels' decorators: one binary serves every batch, vocabulary, stride and alignment.
FREE = {
    "do_not_specialize": [
        "student_stride", "teacher_stride", "gradient_stride", "upstream_stride",
        "V", "shared", "chunk", "parts", "ignore_index", "count", "words",
    ],
    "do_not_specialize_on_alignment": [
        "student", "teacher", "target", "row_weight", "state", "loss", "partials", "gradient", "upstream", "scale",
        "alpha_rows", "temperature_rows", "share_rows", "label_slope", "stretch_rows", "along_rows", "lift_rows",
        "indices", "favourite", "marks", "wrong", "events", "slopes", "values", "spoilt",
    ],
}  # fmt: skip


@triton.jit
def clip(x):
    """max(x, FAR). The default maximum of the device would turn a NaN into a number."""
    return tl.maximum(x, FAR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2(x):
    """One instruction where tl.log2 takes 27; relative error 2**-22, for arguments in (0, 1]."""
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def times(x, y):
    """x * y, rounded: no compiler fuses it into a later sum, so that it has the same bits in every kernel."""
    if INTERPRETED:
        z = x * y
    else:
        z = tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return z


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to the storage's dtype, to nearest even; the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def number(rows, value, row):
    """The row's own number where there is a pointer to one a row, else the float for all."""
    if rows is None:
        x = tl.full([], value, tl.float32)
    else:
        x = tl.load(rows + row).to(tl.float32)
    return x


@triton.jit
def shares_of(share_rows, shares, row):
    """The teachers' weights, from a pointer to (N, K), or from K floats."""
    weights = ()
    for k in tl.static_range(len(shares)):
        if share_rows is None:
            weight = tl.full([], shares[k], tl.float32)
        else:
            weight = tl.load(share_rows + row.to(tl.int64) * len(shares) + k).to(tl.float32)
        weights = weights + (weight,)
    return weights


@triton.jit
def temperature_of(temperature_rows, temperature, row):
    """A NaN where a temperature is not positive, so that its row is NaN."""
    t = number(temperature_rows, temperature, row)
    return tl.where(t > 0, t, float("nan"))


@triton.jit
def scales_of(temperature_rows, temperatures, row):
    """The teachers' c, with exp(x / T) = 2**(c x)."""
    scales = ()
    for k in tl.static_range(len(temperatures)):
        if temperature_rows is None:
            t = temperature_of(None, temperatures[k], row)
        else:
            t = temperature_of(temperature_rows[k], temperatures[k], row)
        scales = scales + (LOG2E / t,)
    return scales


@triton.jit
def scale_of(temperature_rows, temperature, stretch_rows, row):
    """The student's c, whose logits may be divided by a number of the row's own before the temperature."""
    return LOG2E / (temperature_of(temperature_rows, temperature, row) * number(stretch_rows, 1.0, row))


@triton.jit
def first_logit(pointer, row, stride):
    return pointer + row.to(tl.int64) * stride


@triton.jit
def misalignment(pointer, K: tl.constexpr):
    """Elements from the last boundary of K elements to the pointer."""
    SIZE: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return ((pointer.to(tl.int64) & (K * SIZE - 1)) // SIZE).to(tl.int32)


@triton.jit
def aligned(pointer, shift, K: tl.constexpr):
    """The boundary before a row's first logit. The hint, in bytes, is what makes the loads 16 bytes wide."""
    SIZE: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(pointer - shift, K * SIZE if K * SIZE < 16 else 16)


@triton.jit
def teacher_rows(teacher, stride, others, other_strides, row, shift, K: tl.constexpr):
    """The aligned row of each teacher; the launcher saw to it that their shifts are the student's.

    The first teacher comes apart from the others because the members of a tuple are always specialised: by the
    alignment of a pointer, and by the divisibility of a stride.
    """
    rows = ()
    if teacher is not None:
        rows = (aligned(first_logit(teacher, row, stride), shift, K),)
    for k in tl.static_range(len(others)):
        rows = rows + (aligned(first_logit(others[k], row, other_strides[k]), shift, K),)
    return rows


@triton.jit
def offsets(R: tl.constexpr, K: tl.constexpr):
    return (tl.arange(0, R) * K)[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def part_of(part, chunk, first, last):
    """The share of part number ``part`` in [first, last)."""
    return tl.maximum(first, part * chunk), tl.minimum(last, (part + 1) * chunk)


@triton.jit
def cut(first, last, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr):
    """[first, last) as unmasked steps over [body, tail) and a number of masked tiles, the head among them.

    Every bound is a multiple of K by construction: a minimum or a select would hide that from the compiler.
    """
    ragged = ((first % K) != 0).to(tl.int32)
    body = first // K * K + ragged * (R * K)
    tail = body + tl.maximum(last - body, 0) // (R * K * U) * (R * K * U)
    edges = ragged + (tl.maximum(last - tail, 0) + R * K - 1) // (R * K)
    return body, tail, edges


@triton.jit
def edge(e, first, tail, R: tl.constexpr, K: tl.constexpr):
    """Position of masked tile number e: the head if there is one, then the tiles from ``tail`` on."""
    ragged = ((first % K) != 0).to(tl.int32)
    return tl.where(e < ragged, first, tail + (e - ragged) * (R * K)) // K * K


@triton.jit
def load_edge(p, i, first, last, R: tl.constexpr, K: tl.constexpr, present=None):
    """Whole 16-byte groups, in the form that ``load_step`` gives; what lies outside [first, last) becomes -inf."""
    at = i + offsets(R, K)
    limit = last
    if present is not None:
        limit = tl.where(present, last, 0)
    x = tl.load(p + at, mask=(i + tl.arange(0, R) * K < limit)[:, None], other=0.0).to(tl.float32)
    inside = (at >= first) & (at < last)
    return (tl.where(inside, x, -float("inf")),)


@triton.jit
def load_edges(rows, i, first, last, R: tl.constexpr, K: tl.constexpr, present=None):
    tiles = ()
    for k in tl.static_range(len(rows)):
        if present is None:
            tiles = tiles + (load_edge(rows[k], i, first, last, R, K),)
        else:
            tiles = tiles + (load_edge(rows[k], i, first, last, R, K, present[k]),)
    return tiles


@triton.jit
def load_step(p, i, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, present=None):
    """U tiles in flight at once. A row that is not ``present`` is not read, and counts as 0."""
    tiles = ()
    for u in tl.static_range(U):
        at = p + (i + u * R * K) + offsets(R, K)
        if present is None:
            x = tl.load(at)
        else:
            groups = tl.arange(0, R) * K < tl.where(present, R * K, 0)
            x = tl.load(at, mask=groups[:, None], other=0.0)
        tiles = tiles + (x.to(tl.float32),)
    return tiles


@triton.jit
def but(tiles, at, i, R: tl.constexpr, K: tl.constexpr):
    """The tiles at position i with -inf at the position ``at``: probability 0."""
    others = ()
    for u in tl.static_range(len(tiles)):
        others = others + (tl.where(i + u * R * K + offsets(R, K) == at, -float("inf"), tiles[u]),)
    return others


@triton.jit
def all_but(rows, at, i, R: tl.constexpr, K: tl.constexpr):
    others = ()
    for k in tl.static_range(len(rows)):
        others = others + (but(rows[k], at, i, R, K),)
    return others


@triton.jit
def position_of(target, row, shift, V):
    """Of the row's target; -1 for an id that there is not."""
    label = tl.load(target + row)
    return tl.where((label >= 0) & (label < V), label + shift, -1).to(tl.int32)


@triton.jit
def load_steps(rows, i, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, present=None):
    tiles = ()
    for k in tl.static_range(len(rows)):
        if present is None:
            tiles = tiles + (load_step(rows[k], i, R, K, U),)
        else:
            tiles = tiles + (load_step(rows[k], i, R, K, U, present[k]),)
    return tiles
