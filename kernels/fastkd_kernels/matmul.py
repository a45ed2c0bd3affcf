"""Matrix products of which the device alone knows how many rows count: ``multiply`` and ``add_outer``.

``count`` is a 0-dim int64 or int32 tensor on the device of the others, and nothing here waits for it. Operands are
float16, bfloat16 or float32, of any strides. Products are accumulated and returned in float32; where an operand is
float32, or two differ, both are widened and multiplied as float32, without tensor cores. Equal inputs give equal bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .logit import _running_on
from .products import product
from .rows import INTERPRETED


class Tile(NamedTuple):
    """Of the result, BM x BN, and how much of the sum is multiplied at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# Chosen by what the compiler reports (registers, shared memory), and not yet by a clock.
LARGE = Tile(128, 256, 64, warps=8, stages=4)  # 192 KiB of shared memory, one program a multiprocessor
HALF = Tile(128, 128, 64, warps=4, stages=3)  # two programs
SHARED = Tile(128, 128, 64, warps=8, stages=3)  # where a program gets less shared memory, and no larger instructions
SCATTERED = Tile(64, 64, 32, warps=4, stages=3)  # operands that are read one element at a time
EXACT = Tile(64, 64, 16, warps=4, stages=3)  # float32
TINY = Tile(16, 16, 16, warps=1, stages=1)  # for the interpreter
LARGE_BYTES = 200 * 1024
FEW = 256  # tiles, fewer than two for each multiprocessor of an H200
GROUP = 8  # rows of tiles that are gone through together


@torch.no_grad()
def multiply(
    left: Tensor, right: Tensor, count: Tensor, out: Tensor, *, bias: Tensor | None = None, scale: float = 1.0
) -> None:
    """``out[:count] = scale * (left[:count] @ right + bias)``, with left (M, K), right (K, N), bias (N,).

    ``out``: float32 (M, N), rows of stride 1. Rows from the count on are not read, and keep what is in ``out``.
    """
    (M, K), N = left.shape, right.shape[1]
    _check(count, out, (M, N), left.shape, (M, right.shape[0]))
    _launch(left, right, None if bias is None else bias.contiguous(), out, count, scale, (M, N, K), adds=False)


@torch.no_grad()
def add_outer(total: Tensor, left: Tensor, right: Tensor, count: Tensor, *, scale: float = 1.0) -> None:
    """``total += scale * left[:count].T @ right[:count]``, with left (K, M), right (K, N).

    ``total``: float32 (M, N), rows of stride 1, added to in place. Rows from the count on are not read.
    """
    (K, M), N = left.shape, right.shape[1]
    _check(count, total, (M, N), left.shape, (right.shape[0], M))
    _launch(left.t(), right, None, total, count, scale, (M, N, K), adds=True)


def _check(count: Tensor, out: Tensor, size: tuple[int, int], left: Any, agreeing: tuple[int, int]) -> None:
    assert count.ndim == 0, count.shape
    assert count.dtype in (torch.int32, torch.int64), count.dtype
    assert tuple(left) == agreeing, (left, agreeing)
    assert (out.dtype, out.shape) == (torch.float32, size), (out.dtype, out.shape)
    assert out.stride(1) == 1 or size[1] == 1, out.stride()


def _launch(
    left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor, count: Tensor, scale: float,
    sizes: tuple[int, int, int], adds: bool,
) -> None:  # fmt: skip
    M, N, K = sizes
    if M == 0 or N == 0:
        return
    wide = torch.float32 in (left.dtype, right.dtype) or left.dtype is not right.dtype
    straight = [_straight(x) for x in (left, right)]
    tile = _tile(M, N, wide, None in straight, out.device)
    with _running_on(out):
        product[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
            left, *left.stride(), right, *right.stride(), bias, out, out.stride(0), count, float(scale), M, N, K,
            LEFT=straight[0], RIGHT=straight[1], OUT=_straight(out), ADDS=adds, WIDE=wide,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=GROUP,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _straight(x: Tensor) -> int | None:
    """The dimension along which x can be read 16 bytes at a time, if there is one."""
    vector = 16 // x.element_size()
    if x.data_ptr() % 16:
        return None
    for dim in (1, 0):
        if x.stride(dim) == 1 and (x.stride(1 - dim) % vector == 0 or x.shape[1 - dim] == 1):
            return dim
    return None


def _tile(M: int, N: int, wide: bool, scattered: bool, device: torch.device) -> Tile:
    if INTERPRETED.value:
        return TINY
    if wide:
        return EXACT
    if scattered:
        return SCATTERED
    if _shared_memory(device) < LARGE_BYTES:
        return SHARED
    return HALF if triton.cdiv(M, LARGE.BM) * triton.cdiv(N, LARGE.BN) < FEW else LARGE


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have."""
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])
