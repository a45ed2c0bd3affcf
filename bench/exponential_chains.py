"""A kernel that does nothing but exponentials."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
UNROLLED = 16


@triton.jit
def _chains(out, STEPS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = at.to(tl.float32) * 1e-9
    for _ in range(STEPS):
        for _ in tl.static_range(UNROLLED):
            x = tl.exp2(-x)
    tl.store(out + at, x)


def exponential_chains(out: Tensor, length: int) -> Tensor:
    """``length`` times ``x = 2**-x`` for each element of ``out``, which then holds 0.641186, where x stays."""
    assert out.numel() % BLOCK == 0 == length % UNROLLED
    _chains[(out.numel() // BLOCK,)](out, length // UNROLLED, UNROLLED, BLOCK, enable_fp_fusion=True)
    return out
