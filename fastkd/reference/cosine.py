r"""The matrix of cosines of the rows x_i and y_j::

    c_ij = x_i . y_j / (|x_i| |y_j|)

A row no longer than 1e-12 is a row of zeros: its cosines are 0, and so is its gradient.
"""

from __future__ import annotations

from torch import Tensor

from .._matrices import Gradients, result_dtype
from ._gradient import gradients
from ._normalised import normalised


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    dtype = result_dtype(x, y)
    return _matrix(x.to(dtype), None if y is None else y.to(dtype))


def backward(grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool) -> Gradients:
    return gradients(_matrix, grad, x, y)


def _matrix(x: Tensor, y: Tensor | None) -> Tensor:
    units = unit_rows(x)
    return units @ (units if y is None else unit_rows(y)).T


def unit_rows(x: Tensor) -> Tensor:
    return normalised(x, -1)[0]
