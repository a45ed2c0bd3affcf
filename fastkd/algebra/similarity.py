"""Losses of similarities: what ``fastkd/_similarity.py`` says, with products by torch."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _similarity
from . import _products


def _compare(student: Tensor, teacher: Tensor, eps: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    (p, sums), (q, _) = _probabilities(student), _probabilities(teacher)
    total = (q * ((q + eps) / (p + eps)).log_()).sum()
    if not gradient:
        return total, None
    ratio = q.div_(p + eps)
    return total, ((ratio * p).sum(1, keepdim=True) - ratio).div_(sums)


def _probabilities(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """And what they were divided by."""
    similarity = cosines.clamp(-1, 1).add_(1)
    sums = similarity.sum(1, keepdim=True)
    return similarity.div_(sums), sums


pkt_loss = partial(_similarity.pkt_loss, _products, _compare)
correlation_congruence_loss = partial(_similarity.correlation_congruence_loss, _products)
