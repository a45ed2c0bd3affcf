"""Teachers of different kinds: one problem with the hard term in it, and one more for each that has no logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..._rows import SOFT, TEACHER_AGREES, WEIGHT, LogitRows, state_width
from . import Term
from .weighing import NO_TEACHERS, inner, loss_of, soft_rows, upstream


class Several:
    """The teachers with logits and the hard term go first, then the others one by one.

    The student has to be float32 or wider: gradients are added up in its dtype.
    """

    def __init__(self, dense: Term, sparse: Term, expected: Term) -> None:
        self.dense, self.sparse, self.expected = dense, sparse, expected

    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        loss, state, _ = self.dense.forward(replace(rows, sparse=(), expected=(), reduce=False, divisor=1.0))
        states = [state]
        for term, problem, _ in self._others(rows, state):
            values, own, _ = term.forward(problem)
            state[:, SOFT] += values.double()
            state[:, TEACHER_AGREES] += own[:, TEACHER_AGREES]
            states.append(own)
        return loss_of(rows, torch.cat(states, 1), loss.dtype)

    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
        first = state_width(len(rows.teachers))
        above = upstream(rows, state, scale, grad_loss).to(grad_loss.dtype)
        begin, total = first, None
        for term, problem, width in self._others(rows, state):
            grad = term.backward(problem, state[:, begin : begin + width].contiguous(), 1.0, above)
            total, begin = grad if total is None else total.add_(grad), begin + width
        # The first may write over the student's logits, so it comes last.
        problem = replace(rows, sparse=(), expected=())
        grad = self.dense.backward(problem, state[:, :first].contiguous(), scale, grad_loss)
        return grad if total is None else grad.add_(total)

    def _others(self, rows: LogitRows, state: Tensor) -> Iterator[tuple[Term, LogitRows, int]]:
        """Each with its problem and the width of its state."""
        active = soft_rows(rows, state[:, WEIGHT])
        for sparse in rows.sparse:
            k = sparse.indices.shape[1]
            width = state_width(0) + k + 1 + state_width(1)
            yield self.sparse, inner(rows, active, **NO_TEACHERS | {"sparse": (sparse,)}), width
        for expected in rows.expected:
            yield self.expected, inner(rows, active, **NO_TEACHERS | {"expected": (expected,)}), state_width(0)
