"""``torch.nn.Embedding`` with int8 rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._int8_operators import embedding
from .configs import Config, WeightOnly
from .layer import Int8Layer, rounded, with_parameters


class Int8Embedding(Int8Layer):
    """A table of int8 rows, each with its scale. Same as::

        (weight * scale[:, None])[ids]

    in ``dtype``, which follows a cast of the model. There is no input to round, so that all configs do the same.

    Args:
        weight: ``(V, K)`` int8.
        scale: ``(V,)`` float32, what one step of each row stands for.
        dtype: Of the result.
        padding_idx: Kept for the float layer that this may become again.

    Example:
        >>> Int8Embedding.from_float(torch.nn.Embedding(10, 4))(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(weight, scale, None, WeightOnly(), dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_float(cls, layer: nn.Embedding, config: Config | None = None) -> Int8Embedding:
        """One scale for each row."""
        weight, scale = rounded(layer.weight)
        return cls(weight, scale, dtype=layer.weight.dtype, padding_idx=layer.padding_idx)

    def to_float(self) -> nn.Embedding:
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return with_parameters(layer, self.float_weight(), None, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, self.scale, dtype=self.dtype)
