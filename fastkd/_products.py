"""The products of matrices that losses on the relations of a batch are made of, whoever computes them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

ALL = slice(None)


class Products(Protocol):
    """A module of these functions. Tensors are float32 or float64."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """x' y, (D, D'), of x (N, D) and y (N, D'), in float64."""

    def pairs(self, x: Tensor, rows: slice = ALL, wide: bool = False) -> Tensor:
        """x[rows] x', in the dtype of x, or in float64 if ``wide``."""

    def times(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """x y, in the dtype of x; added to ``out``, if that is there. y may be the narrower one."""
