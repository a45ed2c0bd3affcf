"""The matrix of cosines: a product of unit rows, and of their gradient."""

from __future__ import annotations

from torch import Tensor

from .._distances import products
from .._matrices import Gradients, result_dtype
from .._unit_rows import through_unit_rows, unit_rows
from .._widen import widen


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    units, _ = unit_rows(widen(x))
    cosines = products(units) if y is None else units @ unit_rows(widen(y))[0].T
    return cosines.clamp_(-1, 1).to(result_dtype(x, y))


def backward(grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool) -> Gradients:
    dtype, grad = result_dtype(x, y), widen(grad)
    left, lengths = unit_rows(widen(x))
    if y is None:
        return through_unit_rows((grad + grad.T) @ left, left, lengths).to(dtype), None
    right, of_right = unit_rows(widen(y))
    mine = through_unit_rows(grad @ right, left, lengths)
    return mine.to(dtype), through_unit_rows(grad.T @ left, right, of_right).to(dtype)
