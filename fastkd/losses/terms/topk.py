"""The hard term and one sparse teacher.

A teacher known by k ids a row makes k + 1 events: these ids, and any other. The student's log-probabilities of the
events come from one pass over its logits (``topk.py`` of an implementation), the divergence of the k + 1 events from
the same kernels as ever, as rows of k + 1 logits, and its slopes go back over the logits in a second pass: all ids of
the tail share one, in proportion to their probability.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _rows
from ..._rows import FIRST_TEACHER, SOFT, TEACHER_AGREES, LogitRows, SparseTeacher, state_width
from . import Term
from .weighing import NOTHING, column, loss_of, soft_rows, squared, upstream

FLOOR = 2.0**-24  # of the tail's probability where the divergence would be infinite without it
NEARLY_0 = 2.0**-16  # what rounded log-probabilities may leave over
REVERSE = ("reverse_kl", "skew_reverse_kl")


class WithTopK:
    def __init__(self, dense: Term, passes: Any) -> None:
        self.dense, self.passes = dense, passes  # the modules `logit` and `topk` of one implementation

    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        (teacher,) = rows.sparse
        state, events = self.passes.gather(rows, teacher.indices, _best(teacher) if rows.agreement else None)
        active, share = _active(rows, state, teacher), column(teacher.weight, state)
        problem = teacher.notes = _problem(rows, teacher, events, active)
        values, inside, _ = self.dense.forward(problem)
        state[:, SOFT] = torch.where(active, share * squared(rows, state) * values.double(), 0.0)
        state[:, TEACHER_AGREES] *= share
        state = torch.cat([state, events.double(), inside], 1)
        return loss_of(rows, state, torch.promote_types(events.dtype, teacher.log_probs.dtype))

    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
        (teacher,) = rows.sparse
        k = teacher.indices.shape[1]
        own, events, inside = state.split([FIRST_TEACHER, k + 1, state_width(1)], 1)
        own, events, inside = own.contiguous(), events.to(teacher.log_probs.dtype), inside.contiguous()
        active, share = _active(rows, own, teacher), column(teacher.weight, own)
        above = upstream(rows, own, scale, grad_loss) * squared(rows, own) / column(rows.temperature, own)
        above = torch.where(active, above * share, 0.0).to(events.dtype)
        problem = teacher.notes or _problem(rows, teacher, events, active)
        slopes = self.dense.backward(problem, inside, 1.0, above)
        if slopes.shape[1] == k:  # the tail is no event
            slopes = torch.cat([slopes, slopes.new_zeros(len(slopes), 1)], 1)
        grad: Tensor = self.passes.scatter(rows, teacher.indices, own, events, slopes, scale, grad_loss)
        return grad


def _active(rows: LogitRows, state: Tensor, teacher: SparseTeacher) -> Tensor:
    return soft_rows(rows, state[:, _rows.WEIGHT]) & (column(teacher.weight, state) != 0)


def _best(teacher: SparseTeacher) -> Tensor:
    k = teacher.indices.shape[1]
    return teacher.indices.gather(1, teacher.log_probs[:, :k].argmax(1, keepdim=True)).squeeze(1)


def _problem(rows: LogitRows, teacher: SparseTeacher, events: Tensor, active: Tensor) -> LogitRows:
    """The divergence of the events, at temperature 1: they are log-probabilities already."""
    student, taught = (
        (events, _taught(rows, teacher, events)) if teacher.tail != "support" else (events[:, :-1], teacher.log_probs)
    )
    return LogitRows(
        student=student,
        teachers=(taught,),
        row_weight=active.to(events.dtype),
        temperature=1.0,
        teacher_temperature=(1.0,),
        teacher_weight=(1.0,),
        divergence=rows.divergence,
        beta=rows.beta,
        scale_by_t2=False,
        ignore_index=rows.ignore_index,
        shared=student.shape[1],
        agreement=False,
        **NOTHING,
    )


def _taught(rows: LogitRows, teacher: SparseTeacher, events: Tensor) -> Tensor:
    """The log-probabilities of the k + 1 events."""
    log_probs = teacher.log_probs
    if teacher.tail == "events":
        return log_probs
    if teacher.tail == "bucket":
        rest = (1 - log_probs.double().exp().sum(1, keepdim=True)).clamp(min=0)
    else:
        rest = torch.zeros_like(log_probs[:, :1], dtype=torch.float64)
    if rows.divergence in REVERSE:
        rest = rest.clamp(min=FLOOR)
    # Where all ids are named, or all others are masked (-inf), nothing but rounding is left for them.
    all_named = (teacher.indices >= 0).sum(1, keepdim=True) == rows.shared
    masked = (events[:, -1:] == -torch.inf) & (rest <= NEARLY_0)
    rest = torch.where(all_named | masked, 0.0, rest)
    return torch.cat([log_probs, rest.log().to(log_probs.dtype)], 1)
