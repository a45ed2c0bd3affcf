"""Only the student's k best ids, and all others as one event: what on-policy trainers compare in reverse.

The teachers' logits are there, but count where the student has its mass: each becomes a sparse teacher of these ids, by
the pass that makes events of a student's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._rows import TEACHER_AGREES, WEIGHT, LogitRows, SparseTeacher, weights
from . import Term
from .weighing import NO_TEACHERS, column, inner, soft_rows


class StudentTopK:
    def __init__(self, k: int, passes: Any, single: Term, several: Term) -> None:
        self.k, self.passes, self.single, self.several = k, passes, single, several

    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Any]:
        if self.k > rows.shared:  # how many pairs a vocab_map has is found out late
            rule = f"be at most {rows.shared}, the shared vocabulary"
            _checks.bad_value("kd_loss", "student_topk", rule, self.k)
        ids = rows.student[:, : rows.shared].topk(self.k).indices
        active = soft_rows(rows, weights(rows, len(rows.student), rows.student))
        events = [self._events(rows, i, ids, active) for i in range(len(rows.teachers))]
        problem = _problem(rows, ids, events)
        loss, state, scale = self._term(rows).forward(problem)
        if rows.agreement:
            _agreement(rows, problem, state)
        return loss, torch.cat([state, ids.double(), *(x.double() for x in events)], 1), scale

    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
        widths = [self.k, *[self.k + 1] * len(rows.teachers)]
        own, ids, *events = state.split([state.shape[1] - sum(widths), *widths], 1)
        wide = torch.float64 if rows.student.dtype is torch.float64 else torch.float32
        problem = _problem(rows, ids.long(), [x.to(wide) for x in events])
        return self._term(rows).backward(problem, own.contiguous(), scale, grad_loss)

    def _term(self, rows: LogitRows) -> Term:
        return self.single if len(rows.teachers) == 1 else self.several

    def _events(self, rows: LogitRows, i: int, ids: Tensor, active: Tensor) -> Tensor:
        """The teacher's log-probabilities at the ids, and of all others together."""
        teacher = replace(rows, student=rows.teachers[i], temperature=rows.teacher_temperature[i])
        events: Tensor = self.passes.gather(inner(teacher, active, agreement=False, **NO_TEACHERS), ids, None)[1]
        return events


def _problem(rows: LogitRows, ids: Tensor, events: list[Tensor]) -> LogitRows:
    shares = rows.teacher_weight
    weight: Sequence[float | Tensor] = shares.unbind(1) if isinstance(shares, Tensor) else shares
    sparse = tuple(SparseTeacher(ids, x, "events", share) for x, share in zip(events, weight, strict=True))
    return replace(rows, **NO_TEACHERS | {"sparse": sparse})


def _agreement(rows: LogitRows, problem: LogitRows, state: Tensor) -> None:
    """With the teachers' best ids of all, which may be none of the student's k."""
    best, counts = rows.student.argmax(1), state[:, WEIGHT] != 0
    state[:, TEACHER_AGREES] = 0.0
    for teacher, sparse in zip(rows.teachers, problem.sparse, strict=True):
        agrees = (teacher[:, : rows.shared].argmax(1) == best) & counts
        state[:, TEACHER_AGREES] += torch.where(agrees, column(sparse.weight, state), 0.0)
