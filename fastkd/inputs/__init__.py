"""The ways a model's distribution over a vocabulary can be given to a loss, beside logits."""

from .head import Head

__all__ = ["Head"]
