"""From a checked call on logits to its loss: at once, a few rows at a time, or as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import LogitRows
from . import _chunked_autograd, _chunked_operators, _logit_operators
from ._arrangement import arrange, term
from ._logit_arguments import Logits
from ._logit_autograd import LogitLoss, Pending, lay


def compute(
    logits: Logits, rows: LogitRows, impl: str | None, student_topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and state."""
    given = logits.teachers if logits.plain else arrange(logits, rows)
    traced = torch.compiler.is_compiling() or not logits.lie_in_memory()
    if logits.computed or (traced and not logits.plain):
        apply = _chunked_operators.apply if traced else _chunked_autograd.apply
        loss, state = apply(logits, rows, given, impl, student_topk)
    else:
        loss, state = _of_logits(logits, rows, given, impl, traced)  # type: ignore[arg-type]
    return loss if rows.reduce or len(logits.shape) == 1 else loss.view(logits.shape), state


def _of_logits(
    logits: Logits, rows: LogitRows, teachers: tuple[Tensor, ...], impl: str | None, traced: bool
) -> tuple[Tensor, Tensor]:
    """Where all that has logits has them already."""
    student = logits.anchor
    if traced:
        lay(rows, student, teachers, logits.dim)
        return _logit_operators.apply(rows, impl)
    pending = Pending()
    pending.rows, pending.dim = rows, logits.dim
    pending.constants = [(x, x._version) for x in logits.constants if not x.is_inference()]
    others = teachers if logits.plain else [one.log_probs for one in rows.sparse]
    pending.implementation = term(impl, student, others, rows)
    loss = LogitLoss.apply(student, teachers, pending)
    return loss, pending.state
