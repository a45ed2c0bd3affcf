"""The ways a model's distribution over a vocabulary can be given to a loss, beside logits."""

from .expected import Expected
from .head import Head
from .topk import TopK

__all__ = ["Expected", "Head", "TopK"]
