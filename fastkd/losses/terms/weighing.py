"""What the terms have in common: which rows count in the soft term, and how its values and gradients are weighed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import _rows
from ..._rows import LogitRows

NO_TEACHERS: dict[str, Any] = {
    "teachers": (),
    "teacher_temperature": (),
    "teacher_weight": (),
    "sparse": (),
    "expected": (),
}
NOTHING: dict[str, Any] = {  # what a problem has no hard term with
    "target": None,
    "alpha": 0.0,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "reduce": False,
    "divisor": 1.0,
    "overwrite": False,
}


def column(value: float | Tensor, like: Tensor) -> Tensor:
    """(N,) or 0-dim, in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.tensor(value, dtype=torch.float64, device="cpu")  # 0-dim: it fits every device


def number(value: float | Tensor, like: Tensor) -> Tensor:
    """0-dim, float64, where ``like`` is."""
    return value.double() if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float64)


def soft_rows(rows: LogitRows, weight: Tensor) -> Tensor:
    """(N,) bool: where the soft term has a weight."""
    return (weight != 0) & (column(rows.alpha, weight) != 1)


def inner(rows: LogitRows, active: Tensor, **changes: Any) -> LogitRows:
    """The soft term alone, of weight 1 where it counts: its loss is S, its upstream gradient carries every weight."""
    dtype = torch.float64 if rows.student.dtype is torch.float64 else torch.float32
    return replace(rows, row_weight=active.to(dtype), **NOTHING, **changes)


def squared(rows: LogitRows, like: Tensor) -> Tensor:
    """T^2, or 1."""
    return column(rows.temperature, like) ** 2 if rows.scale_by_t2 else column(1.0, like)


def upstream(rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
    """(N,) float64: d loss / d S of every row; 0 where the soft term does not count, whatever comes from above."""
    weight = state[:, _rows.WEIGHT]
    above = grad_loss.double() * scale if rows.reduce else grad_loss.double()
    return torch.where(soft_rows(rows, weight), above * weight * (1 - column(rows.alpha, weight)), 0.0)


def loss_of(rows: LogitRows, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, state and scale, from the columns of a state that is complete."""
    weight, alpha = state[:, _rows.WEIGHT], column(rows.alpha, state)
    # A term of weight 0 is 0 in the state, whatever it multiplies.
    losses = weight * (alpha * state[:, _rows.HARD] + (1 - alpha) * state[:, _rows.SOFT])
    divisor = weight.sum() if rows.divisor is None else number(rows.divisor, state)
    nothing = divisor == 0
    scale = torch.where(nothing, 0.0, 1 / divisor)
    if rows.reduce:
        losses = torch.where(nothing, 0.0, losses.sum() * scale)
    return losses.to(dtype), state, scale
