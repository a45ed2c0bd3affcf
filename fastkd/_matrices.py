"""What every implementation of a matrix over all pairs of rows is asked.

``losses/`` checks a user's arguments. In each implementation the file of a matrix has two functions::

    forward(x, y, squared) -> matrix
    backward(grad, matrix, x, y, squared) -> d / dx, d / dy

x is (N, D), y (M, D) or None for x itself, the matrix (N, M). Their floating dtypes may differ; the matrix is float32,
or float64 if either is, and so are the gradients. Of None the gradient is None. ``squared`` says nothing to a cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._widen import widen

Gradients = tuple[Tensor, Tensor | None]


def result_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    wide = x.dtype is torch.float64 or (y is not None and y.dtype is torch.float64)
    return torch.float64 if wide else torch.float32


def distance_slopes(grad: Tensor, matrix: Tensor, own: bool, squared: bool) -> Tensor:
    """w, (N, M), where the gradient of x_i is sum_j w_ij (x_i - y_j); of x itself, what a pair gets in both orders."""
    grad = widen(grad)
    slopes = 2 * grad if squared else torch.where(matrix == 0, 0.0, grad / matrix)
    return slopes + slopes.T if own else slopes
