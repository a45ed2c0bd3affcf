"""int8 layers for tests: inputs, and what they should give by formulas of their own, in 64 bits and in NumPy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import _int8_operators as int8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def sharp(activation: str, x: Tensor) -> Tensor:
    """The activation without the cancellation that torch's formulas have far below zero, in float64 too."""
    if activation == "gelu":
        return 0.5 * x * torch.special.erfc(x * -(0.5**0.5))
    if activation == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return ACTIVATIONS[activation](x)


def weights(*shape: int, seed: int = 0) -> Tensor:
    """All of int8, -128 too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def scales(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


def flat(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def levels_and_steps(x: Tensor, step: float | None = None) -> tuple[Tensor, Tensor]:
    """int8 numbers of each slice along dimension 0, as float64, and what one of them stands for, as float32."""
    rows = x.float().flatten(1).numpy()
    amax = np.abs(rows).max(1, initial=0)
    steps = amax / np.float32(127) if step is None else np.full(len(rows), step, dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.where(steps[:, None] > 0, rows / steps[:, None], 0)
    numbers = np.clip(np.rint(numbers), -127, 127)
    steps = np.where(np.isfinite(amax), steps, np.nan).astype(np.float32)
    return torch.from_numpy(np.nan_to_num(numbers)).double().view(x.shape), torch.from_numpy(steps)


def finished(sums: Tensor, scale: Tensor, steps: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """What comes before the activation: float64 integers to float32, each operation rounded by itself."""
    value = (sums.numpy().astype(np.float32) * scale.numpy()) * steps.numpy()
    if bias is not None:
        value = value + bias.numpy()
    if residual is not None:
        value = value + residual.float().numpy()
    return torch.from_numpy(value)


def linear(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, step: float | None = None, residual: Tensor | None = None
) -> Tensor:
    numbers, steps = levels_and_steps(x, step)
    return finished(numbers @ w.double().T, scale, steps.unsqueeze(1), bias, residual)


def conv2d(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: float | None = None,
    residual: Tensor | None = None,
    **window: object,
) -> Tensor:
    numbers, steps = levels_and_steps(x, step)
    sums = F.conv2d(numbers, w.double(), **window).round()
    by_channel = [None if value is None else value.view(1, -1, 1, 1) for value in (scale, bias)]
    return finished(sums, by_channel[0], steps.view(-1, 1, 1, 1), by_channel[1], residual)


def as_many_as_fill_the_caches(each: int) -> int:
    """Of so many bytes. What no cache can hold is written past them."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not size.exists():
        pytest.skip("how large the caches are is not known here")
    return int(size.read_text().strip().removesuffix("K")) * 1024 // each


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Of float32 numbers that were rounded to got's dtype; a NaN is as good as another."""
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=0, equal_nan=True)


__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "as_many_as_fill_the_caches",
    "assert_same_bits",
    "conv2d",
    "flat",
    "int8",
    "linear",
    "scales",
    "sharp",
    "weights",
]
