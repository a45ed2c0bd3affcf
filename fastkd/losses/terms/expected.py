"""The hard term and one teacher known by its expected embedding.

With z = scale * (x @ W.T + b) the student's logits and p the teacher's distribution, cross-entropy at temperature T::

    -sum_j p_j log softmax(z / T)_j = logsumexp(z / T) - scale * (x @ (p @ W) + p @ b) / T

so of p only ``mean = p @ W`` and ``bias = p @ b`` are needed, one vector and one number a row. Its gradient to x has
two parts: that of the logsumexp goes through the logits as ever, and ``-scale * mean / T`` past them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _rows
from ..._rows import SOFT, STUDENT_LOGSUM, STUDENT_MAX, ExpectedTeacher, LogitRows
from .weighing import column, loss_of, soft_rows, squared, upstream


class WithExpected:
    def __init__(self, passes: Any) -> None:
        self.passes = passes  # the module `topk` of an implementation: here all ids are the tail

    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        (teacher,) = rows.expected
        state, events = self.passes.gather(rows, _no_ids(rows), None)
        temperature, share = column(rows.temperature, state), column(teacher.weight, state)
        assert rows.hidden is not None
        dot = (rows.hidden.double() * teacher.mean.double()).sum(1)
        if teacher.bias is not None:
            dot += teacher.bias.double()
        value = state[:, STUDENT_LOGSUM] + (state[:, STUDENT_MAX] - dot) / temperature
        if teacher.entropy is not None and rows.divergence == "forward_kl":
            value -= teacher.entropy.double()
        active = soft_rows(rows, state[:, _rows.WEIGHT]) & (share != 0)
        state[:, SOFT] = torch.where(active, share * squared(rows, state) * value, 0.0)
        return loss_of(rows, state, events.dtype)

    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
        (teacher,) = rows.expected
        slopes = _slope(rows, teacher, state, scale, grad_loss).unsqueeze(1)
        wide = torch.float64 if rows.student.dtype is torch.float64 else torch.float32
        everything = torch.zeros_like(slopes, dtype=wide)  # log of the probability of all ids together
        ids = _no_ids(rows)
        grad: Tensor = self.passes.scatter(rows, ids, state, everything, slopes.to(wide), scale, grad_loss)
        return grad


def past_the_logits(rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor | None:
    """(N, H): what of the gradient to ``scale * x`` does not come from the logits."""
    total = None
    for teacher in rows.expected:
        slope = _slope(rows, teacher, state, scale, grad_loss).unsqueeze(1)
        part = torch.where(slope == 0, 0.0, teacher.mean.double() * -slope)
        total = part if total is None else total + part
    return total


def _slope(
    rows: LogitRows, teacher: ExpectedTeacher, state: Tensor, scale: float | Tensor, grad_loss: Tensor
) -> Tensor:
    """d loss / d logsumexp, over T; 0 where the teacher has no weight."""
    share = column(teacher.weight, state)
    above = upstream(rows, state, scale, grad_loss) * squared(rows, state) / column(rows.temperature, state)
    return torch.where(share != 0, above * share, 0.0)


def _no_ids(rows: LogitRows) -> Tensor:
    return torch.empty((len(rows.student), 0), dtype=torch.int64, device=rows.student.device)
