"""The products of matrices that losses on the relations of a batch are made of, whoever computes them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Products(Protocol):
    """A module of these functions. The tensors are float32, or all are float64."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """x' y, (D, D'), of x (N, D) and y (N, D'), in float64."""

    def pairs(self, x: Tensor) -> Tensor:
        """x x', (N, N), in the dtype of x."""

    def times(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """x y, in their dtype; added to ``out``, if that is there."""
