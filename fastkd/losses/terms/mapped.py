"""Vocabularies that are numbered differently: the soft term on the pairs of ids that mean the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..._rows import SOFT, TEACHER_AGREES, WEIGHT, LogitRows, state_width
from . import Term
from .weighing import NO_TEACHERS, inner, loss_of, soft_rows, upstream


class Mapped:
    """``pairs``: (2, n), the student's ids and the teacher's. Ids of sparse teachers are positions among the pairs.

    The student has to be float32 or wider: gradients are added up in its dtype.
    """

    def __init__(self, dense: Term, soft: Term, pairs: Tensor) -> None:
        self.dense, self.soft, (self.student_ids, self.teacher_ids) = dense, soft, pairs

    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        loss, state, _ = self.dense.forward(replace(self._hard(rows), reduce=False, divisor=1.0))
        values, own, _ = self.soft.forward(self._problem(rows, state))
        state[:, SOFT] = values.double()
        state[:, TEACHER_AGREES] = own[:, TEACHER_AGREES]
        if rows.agreement:  # the best id of all, not of the pairs
            best = rows.student.index_select(1, self.student_ids).argmax(1)
            state[:, TEACHER_AGREES] *= rows.student.argmax(1) == self.student_ids[best]
        return loss_of(rows, torch.cat([state, own], 1), loss.dtype)

    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
        own, inside = state[:, : state_width(0)].contiguous(), state[:, state_width(0) :].contiguous()
        above = upstream(rows, own, scale, grad_loss).to(grad_loss.dtype)
        soft = self.soft.backward(self._problem(rows, own), inside, 1.0, above)
        grad = self.dense.backward(self._hard(rows), own, scale, grad_loss)
        return grad.index_add_(1, self.student_ids, soft)

    def _hard(self, rows: LogitRows) -> LogitRows:
        return replace(rows, shared=rows.student.shape[1], standardize=False, **NO_TEACHERS)

    def _problem(self, rows: LogitRows, state: Tensor) -> LogitRows:
        active = soft_rows(rows, state[:, WEIGHT])
        student = rows.student.index_select(1, self.student_ids)
        teachers = tuple(teacher.index_select(1, self.teacher_ids) for teacher in rows.teachers)
        return inner(rows, active, student=student, teachers=teachers, shared=student.shape[1])
