"""A teacher known by k ids a row: ``gather`` and ``scatter``, which plan and launch the kernels.

``rows`` is a problem as the caller's contract has it, and is read by attribute. Beside the logits there are a bit for
each of them, a few numbers a row and k floats: nothing else has the size of rows x vocabulary. Nothing is added
atomically, so equal inputs give equal bits, and nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logit import _arguments, _float, _has_hard_term, _launch, _like, _per_row, _plan, _running_on
from .rows import FIRST_TEACHER, MAX_PARTS, STUDENT_PARTIALS
from .topk_gradients import named_gradients, place_named, spread_gradient
from .topk_values import gather_events, mark_named, tail_statistics

ENTRIES = 128  # that a small program takes at once


@torch.no_grad()
def gather(rows: Any, indices: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor]:
    """State and events of a ``LogitRows``; the contract is written beside that class."""
    n, vocabulary = rows.student.shape
    count = indices.shape[1]
    state = rows.student.new_empty((n, FIRST_TEACHER.value), dtype=torch.float64)
    events = rows.student.new_empty((n, count + 1), dtype=torch.float32)
    if not n:
        return state, events
    plan, hard = _plan(rows, rows.student), _has_hard_term(rows)
    words = (rows.shared + plan.K) // (4 * plan.K) + 1  # a byte for K ids, the first of which may begin a row
    arguments = _topk_arguments(rows, indices) | {
        "favourite": None if best is None else best.contiguous(),
        "row_weight": None if rows.row_weight is None else rows.row_weight.contiguous(),
        "marks": torch.zeros((n, words), dtype=torch.int32, device=rows.student.device),
        "words": words,
        "wrong": rows.student.new_empty(n, dtype=torch.int32),
        "state": state,
        "events": events,
        "partials": events.new_empty((n, plan.parts, STUDENT_PARTIALS.value)),
        "parts": plan.parts,
        "ignore_index": rows.ignore_index,
        "BEYOND": rows.shared < vocabulary and (hard or rows.agreement),
        "SMOOTH": hard and rows.label_smoothing != 0,
        "AGREE": bool(rows.agreement),
        "MAX": MAX_PARTS,
        "K": plan.K,
    }
    with _running_on(rows.student):
        _launch(mark_named, (n,), None, arguments)
        _launch(tail_statistics, (n, plan.parts), plan, arguments)
        _launch(gather_events, (n,), None, arguments)
    return state, events


@torch.no_grad()
def scatter(
    rows: Any,
    indices: Tensor,
    state: Tensor,
    events: Tensor,
    slopes: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
) -> Tensor:
    """The gradient of the student's logits, from what any implementation gathered."""
    n, vocabulary = rows.student.shape
    gradient = rows.student if rows.overwrite else _like(rows.student)
    if not n:
        return gradient
    plan = _plan(rows, rows.student, gradient)
    arguments = _topk_arguments(rows, indices) | {
        "gradient": gradient,
        "gradient_stride": gradient.stride(0),
        "state": state.contiguous(),
        "events": events.to(torch.float32).contiguous(),
        "slopes": slopes.to(torch.float32).contiguous(),
        "values": state.new_empty((n, indices.shape[1]), dtype=torch.float32),
        "spoilt": state.new_empty(n, dtype=torch.float32),
        "upstream": grad_loss,
        "upstream_stride": 0 if rows.reduce else grad_loss.stride(0),
        "scale": scale if rows.reduce else None,
        "BEYOND": rows.shared < vocabulary,
    }
    with _running_on(rows.student):
        _launch(named_gradients, (n,), None, arguments)
        _launch(spread_gradient, (n, plan.parts), plan, arguments)
        _launch(place_named, (n,), None, arguments)
    return gradient


def _topk_arguments(rows: Any, indices: Tensor) -> dict[str, Any]:
    """What all kernels take; ``_arguments`` knows of no soft term without a teacher."""
    one = not isinstance(rows.temperature, Tensor) and rows.temperature == 1
    return _arguments(rows) | {
        "temperature_rows": _per_row(rows.temperature),
        "temperature": _float(rows.temperature),
        "shared": rows.shared,
        "indices": indices.contiguous(),
        "count": indices.shape[1],
        "SAME": _has_hard_term(rows) and one and rows.shared == rows.student.shape[1],
        "B": ENTRIES,
    }
