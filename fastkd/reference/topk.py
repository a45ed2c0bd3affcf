r"""A teacher known by k ids a row: what its events are worth to the student, and what their slopes do to its logits.

With s a row of the student's logits, T its temperature, and j over the shared ids that the teacher does not name::

    q = softmax(s / T)    events = log q_1, ..., log q_k, log Q    Q = sum_j q_j

A loss of the events with the slopes d loss / d s_e (e among the k ids) and, of all other logits together, d loss / d
log Q at fixed ratios among them, has the gradient ``slope_tail * q_j / Q`` at each of these. The contract is written in
``fastkd/_topk_rows.py``; the hard term is that of ``logit.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _rows, _topk_rows
from .._rows import LogitRows
from .logit import (
    INF,
    _agreement,
    _column,
    _dtype,
    _hard_gradient,
    _hard_term,
    _log_normaliser,
    _state,
    _temperature,
    _weight,
)


def gather(rows: LogitRows, indices: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype, weight = _dtype(rows), _weight(rows, _dtype(rows))
    if rows.student.is_cpu:
        _checks.row_data(rows, rows.student.shape[-1])
        _topk_rows.refuse_wrong_ids(indices[weight != 0], rows.shared)
    state = rows.student.new_zeros((rows.student.shape[0], _rows.FIRST_TEACHER), dtype=dtype)
    state[:, _rows.WEIGHT] = weight
    if rows.target is not None:
        _hard_term(rows, state)
    if rows.agreement:
        _agreement(rows, state)
        if best is not None:
            agrees = (rows.student.argmax(-1) == best) & (weight != 0)
            state[:, _rows.TEACHER_AGREES] = agrees.to(dtype)
    events = _events(rows, indices, state)
    return state.double(), events


def scatter(
    rows: LogitRows,
    indices: Tensor,
    state: Tensor,
    events: Tensor,
    slopes: Tensor,
    scale: float | Tensor,
    grad_loss: Tensor,
) -> Tensor:
    dtype = _dtype(rows)
    state = state.to(dtype)
    grad = torch.zeros(rows.student.shape, dtype=dtype, device=rows.student.device)
    grad[:, : rows.shared] = _soft_gradient(rows, indices, state, events.to(dtype), slopes.to(dtype))
    if rows.target is not None:
        upstream = grad_loss.to(dtype) * (
            torch.as_tensor(scale, dtype=dtype, device=state.device) if rows.reduce else 1.0
        )
        weight = (upstream * state[:, _rows.WEIGHT]).unsqueeze(-1)
        grad += _hard_gradient(rows, state, weight * _column(rows.alpha, dtype))
    spoilt = _soft(rows, state) & slopes.isnan().any(-1, keepdim=True)
    grad = torch.where(spoilt, torch.nan, grad)
    return rows.student.copy_(grad) if rows.overwrite else grad.to(rows.student.dtype)


def _events(rows: LogitRows, indices: Tensor, state: Tensor) -> Tensor:
    """Fills the student's columns of the state too."""
    dtype, temperature = state.dtype, _temperature(rows.temperature, state.dtype)
    student, soft = rows.student[:, : rows.shared].to(dtype), _soft(rows, state)
    highest, logsum = _log_normaliser(student, temperature)
    columns = torch.cat([highest, logsum], -1)
    state[:, _rows.STUDENT_MAX : _rows.STUDENT_LOGSUM + 1] = torch.where(soft, columns, 0.0)

    known = (indices >= 0) & (indices < rows.shared)
    named = torch.where(known, student.gather(1, torch.where(known, indices, 0)), -INF)
    others = student.masked_fill(_named(rows, indices), -INF)
    tail_highest, tail_logsum = _log_normaliser(others, temperature)
    empty = tail_highest == -INF
    peaks = torch.cat([named, tail_highest], -1)
    above = torch.cat([torch.zeros_like(named), torch.where(empty, 0.0, tail_logsum)], -1)
    lowest = torch.finfo(dtype).min  # what is finite stays finite: -inf says that there is nothing
    events = torch.where(peaks == -INF, -INF, ((peaks - highest) / temperature + above - logsum).clamp(min=lowest))
    wrong = (
        logsum.isnan() | tail_logsum.isnan() & ~empty | _topk_rows.wrong_ids(indices, rows.shared).any(-1, keepdim=True)
    )
    return torch.where(soft, torch.where(wrong, torch.nan, events), 0.0)


def _soft_gradient(rows: LogitRows, indices: Tensor, state: Tensor, events: Tensor, slopes: Tensor) -> Tensor:
    temperature = _temperature(rows.temperature, state.dtype)
    highest, logsum = _state(state, _rows.STUDENT_MAX), _state(state, _rows.STUDENT_LOGSUM)
    lq = (rows.student[:, : rows.shared].to(state.dtype) - highest) / temperature - logsum
    tail, slope = events[:, -1:], slopes[:, -1:]
    share = (lq - tail).clamp(max=0.0).exp()  # what would be more is a named id, or rounding
    grad = torch.where((tail == -INF) | (slope == 0), 0.0, slope * share)
    grad = torch.cat([grad, torch.zeros_like(slope)], -1)
    grad = grad.scatter(1, _somewhere(rows, indices), slopes[:, :-1])[:, : rows.shared]
    return torch.where(_soft(rows, state), grad, 0.0)


def _soft(rows: LogitRows, state: Tensor) -> Tensor:
    return (state[:, _rows.WEIGHT] != 0).unsqueeze(-1) & (_column(rows.alpha, state.dtype) != 1)


def _somewhere(rows: LogitRows, indices: Tensor) -> Tensor:
    """The ids, and one past the last for every entry that is none."""
    return torch.where((indices >= 0) & (indices < rows.shared), indices, rows.shared)


def _named(rows: LogitRows, indices: Tensor) -> Tensor:
    """Whether the teacher names an id, for all that are shared."""
    shape = (indices.shape[0], rows.shared + 1)
    nothing = torch.zeros(shape, dtype=torch.bool, device=indices.device)
    return nothing.scatter(1, _somewhere(rows, indices), True)[:, : rows.shared]
