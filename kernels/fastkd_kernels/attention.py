"""Losses on attention scores: ``forward`` and ``backward``, which plan and launch the kernels.

``rows`` is a problem as the caller's contract has it, and is read by attribute. Scores are made in tiles and never
stored: once for the values, and again for the gradients of queries and for those of keys, since a program that owns its
results adds nothing atomically. Nothing here waits for the device.

16-bit queries and keys are multiplied on tensor cores, their products added up in float32; so are a gradient's, of
which the slopes keep float32's digits. float32 is multiplied as such.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attention_gradients import key_gradients, query_gradients
from .attention_values import row_values
from .logit import _running_on
from .rows import INTERPRETED

COUNTS, STATE_WIDTH = 0, 5  # as the contract of the callers has them
FIRST_NUMBER = 1  # of the columns that a gradient needs


class Tile(NamedTuple):
    """Queries and keys, what is multiplied of a head at a time, and of a gradient how much a program owns."""

    BM: int
    BN: int
    piece: int
    slice: int
    warps: int
    stages: int


# Chosen by what the compiler reports (registers, shared memory), and not yet by a clock.
VALUES = Tile(64, 32, 64, 0, warps=4, stages=2)
QUERIES = Tile(64, 32, 64, 64, warps=8, stages=2)
KEYS = Tile(64, 32, 64, 64, warps=8, stages=2)
EXACT_VALUES = Tile(64, 32, 16, 0, warps=8, stages=2)  # float32
EXACT_QUERIES = Tile(64, 32, 16, 32, warps=4, stages=2)
EXACT_KEYS = Tile(32, 32, 16, 32, warps=8, stages=2)
TINY = Tile(32, 16, 16, 16, warps=1, stages=1)  # for the interpreter, and as tall as those above
SHORT = 64  # longer heads leave a gradient no registers to read ahead
HELD, EXACT_HELD = 128, 64  # the largest head whose tokens a program holds; those of others it reads again
LEAST = 16  # of what tensor cores multiply


@torch.no_grad()
def forward(rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, state and scale of an ``AttentionRows``; the contract is written where that class is."""
    queries = rows.student_queries
    sizes = queries.shape[:3]
    state = queries.new_empty((*sizes, STATE_WIDTH), dtype=torch.float64)
    loss = queries.new_empty(sizes, dtype=torch.float32)
    if rows.student_keys.shape[2] == 0:
        state.zero_()
        loss.zero_()
    elif loss.numel():
        tile = _tile(rows, VALUES, EXACT_VALUES)
        arguments = _arguments(rows, tile) | {"state": state, "loss": loss, "counts": _counts(rows)}
        arguments["COLUMNS"] = STATE_WIDTH
        programs = triton.cdiv(sizes[2], tile.BM) * sizes[0] * sizes[1]
        _launch(row_values, programs, tile, arguments, loss)
    divisor = state[..., COUNTS].sum() if rows.divisor is None else state.new_full((), rows.divisor)
    nothing = divisor == 0
    scale = torch.where(nothing, 0.0, 1 / divisor)
    if rows.reduce:
        loss = torch.where(nothing, 0.0, loss.sum() * scale).to(torch.float32)
    return loss, state, scale


@torch.no_grad()
def backward(
    rows: Any, state: Tensor, scale: Tensor, grad_loss: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the student's queries and keys, from the state that any implementation's forward left."""
    queries, keys = rows.student_queries, rows.student_keys
    # Where both are one tensor, what it gets as queries is added, in float32, to what it gets as keys.
    beside = torch.empty_like(queries, dtype=torch.float32) if rows.same else None
    of_queries = beside if rows.same else torch.empty_like(queries) if wanted[0] else None
    of_keys = torch.empty_like(keys) if rows.same or wanted[1] else None
    if queries.numel() == 0 or keys.numel() == 0:
        nothing = (of_keys, None) if rows.same else (of_queries, of_keys)
        return tuple(None if x is None else x.zero_() for x in nothing)  # type: ignore[return-value]

    weight = grad_loss.to(torch.float64) * (scale if rows.reduce else 1.0)
    weight = torch.where(state[..., COUNTS] != 0, weight, 0.0).to(torch.float32)
    numbers = state[..., FIRST_NUMBER:].movedim(-1, 0).to(torch.float32).contiguous()
    given = {"weight": weight, "numbers": numbers, "counts": _counts(rows)}
    if of_queries is not None:
        _gradient(rows, query_gradients, _tile(rows, QUERIES, EXACT_QUERIES), queries, of_queries, None, given)
    if of_keys is not None:
        _gradient(rows, key_gradients, _tile(rows, KEYS, EXACT_KEYS), keys, of_keys, beside, given)
    return (of_keys, None) if rows.same else (of_queries, of_keys)


def _gradient(
    rows: Any, kernel: Any, tile: Tile, x: Tensor, out: Tensor, beside: Tensor | None, given: dict[str, Any]
) -> None:
    batch, heads, tokens, dim = x.shape
    slice = _piece(tile.slice, dim)
    arguments = _arguments(rows, tile) | given | _strided("out", out) | {"BO": slice}
    arguments |= _strided("beside", out if beside is None else beside) | {"beside": beside}
    arguments["ALIGNED"] &= _aligned(out) and (beside is None or _aligned(beside))
    size = tile.BM if kernel is query_gradients else tile.BN
    _launch(kernel, triton.cdiv(tokens, size) * batch * heads * triton.cdiv(dim, slice), tile, arguments, out)


def _launch(kernel: Any, programs: int, tile: Tile, arguments: dict[str, Any], like: Tensor) -> None:
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    with _running_on(like):
        kernel[(programs,)](**taken, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def _arguments(rows: Any, tile: Tile) -> dict[str, Any]:
    """What all kernels take."""
    tensors = rows.student_queries, rows.student_keys, rows.teacher_queries, rows.teacher_keys
    queries, keys, teacher_queries, teacher_keys = tensors
    arguments: dict[str, Any] = {}
    for name, x in zip(("q_s", "k_s", "q_t", "k_t"), tensors, strict=True):
        arguments |= _strided(name, x)
    heads, dims = queries.shape[1], (queries.shape[3], teacher_queries.shape[3])
    return arguments | {
        "key_mask": None if rows.key_mask is None else rows.key_mask.view(torch.uint8),
        "scale": float(rows.scale),
        "teacher_scale": float(rows.teacher_scale),
        "heads": heads,
        "student_sharing": heads // keys.shape[1],
        "teacher_sharing": heads // teacher_keys.shape[1],
        "queries": queries.shape[2],
        "keys": keys.shape[2],
        "CAUSAL": bool(rows.causal),
        "D": dims[0],
        "E": dims[1],
        "BD": _piece(tile.piece, dims[0]),
        "BE": _piece(tile.piece, dims[1]),
        "ALIGNED": all(_aligned(x) for x in tensors),
        "HELD": max(dims) <= (EXACT_HELD if _is_wide(rows) else HELD),
        "BM": tile.BM,
        "BN": tile.BN,
    }


def _strided(name: str, x: Tensor) -> dict[str, Any]:
    batch, head, token, _ = x.stride()
    return {name: x, f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}


def _counts(rows: Any) -> Tensor | None:
    """Which queries count, as bytes (B, L); None if all do."""
    if rows.key_mask is None and rows.query_mask is None:
        return None
    sizes = rows.student_queries.shape
    counts: Tensor = rows.student_queries.new_ones((sizes[0], sizes[2]), dtype=torch.bool)
    if rows.key_mask is not None:
        counts = rows.key_mask.cumsum(1) > 0 if rows.causal else rows.key_mask.any(1, keepdim=True).expand_as(counts)
    if rows.query_mask is not None:
        counts = counts & rows.query_mask
    return counts.contiguous().view(torch.uint8)


def _aligned(x: Tensor) -> bool:
    """Whether every token begins at a multiple of 16 bytes."""
    vector = 16 // x.element_size()
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    return x.data_ptr() % 16 == 0 and all(n == 1 or stride % vector == 0 for n, stride in strides)


def _is_wide(rows: Any) -> bool:
    return torch.float32 in (rows.student_queries.dtype, rows.teacher_queries.dtype)


def _tile(rows: Any, narrow: Tile, wide: Tile) -> Tile:
    if INTERPRETED.value:
        return TINY
    if _is_wide(rows):
        return wide
    long = max(rows.student_queries.shape[3], rows.teacher_queries.shape[3]) > SHORT
    return narrow._replace(stages=1) if long and narrow.slice else narrow


def _piece(largest: int, dim: int) -> int:
    return min(largest, max(LEAST, int(triton.next_power_of_2(dim))))
