"""Addresses of two batches of rows, for the C++ kernels (csrc/cpu/pairs_matrix.h)."""

from __future__ import annotations

from torch import Tensor

from .._matrices import Gradients, distance_slopes, result_dtype
from .._widen import widen
from .rkd import pull, squares


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    matrix = squares(widen(x), None if y is None else widen(y))
    return (matrix if squared else matrix.sqrt_()).to(result_dtype(x, y))


def backward(grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool) -> Gradients:
    dtype = result_dtype(x, y)
    slopes = distance_slopes(grad, matrix, y is None, squared).contiguous()
    left = widen(x)
    if y is None:
        return pull(slopes, left).to(dtype), None
    right = widen(y)
    return pull(slopes, left, right).to(dtype), pull(slopes.T.contiguous(), right, left).to(dtype)
