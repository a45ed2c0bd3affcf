"""A transformer small enough to train while one waits."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import int8


class LanguageModel(nn.Module):
    """Embedding, one pre-norm block, and the embedding again as output head."""

    def __init__(self, log_frequency: Tensor, window: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(len(log_frequency), width)
        self.position = nn.Parameter(torch.empty(window, width))
        self.attention_norm, self.mlp_norm, self.head_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        # Starting from how frequent each token is spares the first hundred steps, which learn nothing else.
        self.bias = nn.Parameter(log_frequency.clone())
        for weight in (self.token.weight, self.position):
            nn.init.normal_(weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(batch, window, vocabulary)`` of ids ``(batch, window)``."""
        return F.linear(self.hidden(ids), self.token.weight, self.bias)

    def hidden(self, ids: Tensor) -> Tensor:
        """``(batch, window, width)``: what the output head turns into logits."""
        x = self.token(ids) + self.position[: ids.shape[1]]
        x = x + self._attend(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        normed: Tensor = self.head_norm(x)
        return normed

    def _attend(self, x: Tensor) -> Tensor:
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        heads_joined: Tensor = self.mix(mixed.transpose(1, 2).flatten(2))
        return heads_joined


class WithHead(nn.Module):
    """The language model with its output as a layer of its own, which shares its weight with the embedding."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        vocabulary, width = model.token.weight.shape
        self.head = nn.Linear(width, vocabulary, device="meta")
        self.head.weight, self.head.bias = model.token.weight, model.bias

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.model.hidden(ids))
        return logits


def rounded(model: LanguageModel) -> WithHead:
    """A copy whose layers are int8, the output too."""
    copied = copy.deepcopy(WithHead(model)).eval()
    int8.quantize_(copied)
    return copied
