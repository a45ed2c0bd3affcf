"""Addresses of the rows of a logit loss for the C++ kernels (csrc/cpu/logit_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._rows import DIVERGENCES, LogitRows, state_width
from . import extension

_C = extension()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DIVERGENCE = {name: i for i, name in enumerate(DIVERGENCES)}
BATCH_DIVISOR = -1.0  # the sum of the weights of the rows that count


def forward(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
    n = rows.student.shape[0]
    state = torch.empty((n, state_width(len(rows.teachers))), dtype=torch.float64)
    loss, scale = torch.empty(() if rows.reduce else (n,)), torch.empty((), dtype=torch.float64)
    divisor = rows.divisor
    divisor = BATCH_DIVISOR if divisor is None else float(divisor)
    fault, got = _C.logit_forward(
        _problem(rows), rows.reduce, divisor, loss.data_ptr(), state.data_ptr(), scale.data_ptr()
    )
    if fault:
        _refuse(rows, fault, got)
    return loss, state, scale


def backward(rows: LogitRows, state: Tensor, scale: Tensor, grad_loss: Tensor) -> Tensor:
    student = rows.student
    if rows.reduce:
        upstream = (0, 0, float(grad_loss) * float(scale))
    else:
        upstream = (grad_loss.data_ptr(), grad_loss.stride(0), 0.0)
    grad = student if rows.overwrite else torch.empty(student.shape, dtype=student.dtype)
    _C.logit_backward(_problem(rows), state.data_ptr(), upstream, grad.data_ptr(), grad.stride(0), not rows.overwrite)
    return grad


def _problem(rows: LogitRows) -> object:
    student, target, shared = rows.student, rows.target, rows.shared
    weight = rows.row_weight
    shares = rows.teacher_weight
    return _C.LogitProblem(
        (student.data_ptr(), student.stride(0), DTYPES[student.dtype]),
        [(teacher.data_ptr(), teacher.stride(0), DTYPES[teacher.dtype]) for teacher in rows.teachers],
        *student.shape,
        shared,
        0 if target is None else target.data_ptr(),
        rows.ignore_index,
        (0, 0, 1.0) if weight is None else _by_row(weight),
        _by_row(rows.alpha),
        _by_row(rows.temperature),
        [_by_row(temperature) for temperature in rows.teacher_temperature],
        [_by_row(share) for share in (shares.unbind(1) if isinstance(shares, Tensor) else shares)],
        DIVERGENCE[rows.divergence],
        rows.beta,
        rows.scale_by_t2,
        rows.label_smoothing,
        rows.z_loss,
        rows.agreement,
        torch.get_num_threads(),
    )


def _by_row(value: float | Tensor) -> tuple[int, int, float]:
    return (value.data_ptr(), value.stride(0), 0.0) if isinstance(value, Tensor) else (0, 0, value)


def _refuse(rows: LogitRows, fault: int, got: float) -> None:
    op = "kd_loss" if rows.teachers else "cross_entropy"
    if fault == 1:
        _checks.bad_id(op, rows.student.shape[1], rows.ignore_index, int(got))
    _checks.bad_value(op, "temperature" if fault == 2 else "teacher_temperature", "be positive in every row", got)
