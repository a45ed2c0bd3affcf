"""The matrix of distances, from matrix products where they are precise and from differences where not."""

from __future__ import annotations

from torch import Tensor

from .._distances import pull, squares
from .._matrices import Gradients, distance_slopes, result_dtype
from .._widen import widen


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    matrix = squares(widen(x), None if y is None else widen(y))
    return (matrix if squared else matrix.sqrt()).to(result_dtype(x, y))


def backward(grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool) -> Gradients:
    dtype = result_dtype(x, y)
    slopes = distance_slopes(grad, matrix, y is None, squared)
    near = None if squared else widen(matrix).square()
    left, right = widen(x), None if y is None else widen(y)
    mine = pull(slopes, left, right, near).to(dtype)
    if right is None:
        return mine, None
    return mine, pull(slopes.T, right, left, None if near is None else near.T).to(dtype)
