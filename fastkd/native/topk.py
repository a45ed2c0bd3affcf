"""Addresses of what the ids of a sparse teacher are gathered from and scattered to (csrc/cpu/topk_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _topk_rows
from .._rows import FIRST_TEACHER, LogitRows
from . import extension
from .logit import CPU, _logits, _nowhere, _numbers, _refuse

_C = extension()
FAULTS = (None, _topk_rows.OUTSIDE, _topk_rows.TWICE)  # IdFault in csrc/cpu/topk_rows.h


def gather(rows: LogitRows, indices: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor]:
    n, count = indices.shape
    state = torch.empty(n, FIRST_TEACHER, dtype=torch.float64, device=CPU)
    events = torch.empty(n, count + 1, dtype=torch.float32, device=CPU)
    numbers = rows.notes = _numbers(rows)
    best = None if best is None else best.contiguous()
    fault, wrong, got = _C.topk_gather(
        _logits(rows),
        numbers,
        indices.data_ptr() or _nowhere(indices),
        count,
        0 if best is None else best.data_ptr() or _nowhere(best),
        state.data_ptr(),
        events.data_ptr(),
    )
    if fault:
        _refuse(rows, fault, got)
    if reason := FAULTS[wrong]:
        _topk_rows.bad_id(reason, rows.shared, int(got))
    return state, events


def scatter(
    rows: LogitRows,
    indices: Tensor,
    state: Tensor,
    events: Tensor,
    slopes: Tensor,
    scale: float | Tensor,
    grad_loss: Tensor,
) -> Tensor:
    student = rows.student
    grad = student if rows.overwrite else torch.empty_like(student, memory_format=torch.contiguous_format)
    slopes = slopes.contiguous()
    _C.topk_scatter(
        _logits(rows),
        rows.notes or _numbers(rows),
        indices.data_ptr() or _nowhere(indices),
        indices.shape[1],
        state.data_ptr(),
        events.data_ptr(),
        slopes.data_ptr() or _nowhere(slopes),
        grad_loss.data_ptr() or _nowhere(grad_loss),
        0 if rows.reduce else grad_loss.stride(0),
        float(scale) if rows.reduce else 1.0,
        grad.data_ptr(),
        grad.stride(0),
        not rows.overwrite,
    )
    return grad
