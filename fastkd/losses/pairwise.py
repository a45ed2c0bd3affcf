"""Matrices over all pairs of rows: distances and cosines, for losses of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from ._matrix_autograd import matrix_of


def pairwise_distance(x: Tensor, y: Tensor | None = None, *, squared: bool = False, impl: str | None = None) -> Tensor:
    """Euclidean distances of all pairs of rows. Same value as::

        torch.cdist(x, x if y is None else y)

    but what that loses to cancellation is kept: distances come from the differences of rows, or are as exact. Where
    rows are far from the origin and close to one another, its result may be off by percents, and above 0 between equal
    rows; of its gradient nothing may be right; and below 26 rows it refuses half precision. Here the diagonal is 0 if y
    is None, and the gradient is 0 where the distance is.

    Args:
        x: Rows ``(N, D)``; float16, bfloat16, float32 or float64. Gets a gradient of its dtype.
        y: Rows ``(M, D)`` on the same device, of any of these dtypes, which get a gradient too; or None for x itself,
            at half the work.
        squared: Give the squares, whose gradient is smooth.
        impl: Pin an implementation; :func:`fastkd.explain` lists them.

    Returns:
        ``(N, M)``: float32, or float64 if x or y is.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Example:
        >>> import torch
        >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0., 5.],
                [5., 0.]])
    """
    _check("pairwise_distance", x, y)
    if not isinstance(squared, bool):
        _checks.bad_type("pairwise_distance", "squared", "be a bool", type(squared).__name__)
    return matrix_of("pairwise_distance", impl, x, y, squared)


def pairwise_cosine(x: Tensor, y: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """Cosines of all pairs of rows. Same value as::

        F.normalize(x, dim=1) @ F.normalize(x if y is None else y, dim=1).T

    summed in float64. A row no longer than 1e-12 counts as zero: its cosines are 0, and so is its gradient.

    Args:
        x, y, impl: As in :func:`pairwise_distance`, as are the result and the errors.

    Example:
        >>> import torch
        >>> pairwise_cosine(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))
        tensor([[1.0000, 0.6000, 0.0000],
                [0.6000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    _check("pairwise_cosine", x, y)
    return matrix_of("pairwise_cosine", impl, x, y)


def _check(op: str, x: Any, y: Any) -> None:
    for name, rows in (("x", x), ("y", y)):
        if name == "y" and rows is None:
            return
        _checks.floats(op, name, rows)
        if rows.ndim != 2:
            _checks.bad_value(op, name, "have the shape (rows, D)", tuple(rows.shape))
    if y.device != x.device:
        _checks.bad_value(op, "y", f"be on the device of x, {x.device}", y.device)
    if y.shape[1] != x.shape[1]:
        _checks.bad_value(op, "y", f"have rows as long as those of x, {x.shape[1]}", y.shape[1])
