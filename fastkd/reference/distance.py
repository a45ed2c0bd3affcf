r"""The matrix of distances of the rows x_i and y_j::

    d_ij = sqrt(sum_d (x_id - y_jd)^2)          or its square

At d_ij = 0 its gradient is 0; otherwise it is the unit vector from y_j to x_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._matrices import Gradients, result_dtype
from .._scale import power_of_two
from ._gradient import gradients


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    dtype = result_dtype(x, y)
    return _matrix(x.to(dtype), None if y is None else y.to(dtype), squared)


def backward(grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool) -> Gradients:
    return gradients(lambda x, y: _matrix(x, y, squared), grad, x, y)


def _matrix(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    differences = x[:, None] - (x if y is None else y)
    scale = power_of_two(differences)
    squares = (differences / scale).square().sum(-1)
    if squared:
        return squares * scale * scale
    zero = squares == 0
    return torch.where(zero, 1.0, squares).sqrt().masked_fill(zero, 0) * scale
