"""Addresses and numbers of the rows of a logit loss, for the C++ kernels (csrc/cpu/logit_rows.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from .._rows import DIVERGENCES, LogitRows, state_width
from . import extension

_C = extension()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DIVERGENCE = {name: i for i, name in enumerate(DIVERGENCES)}
NONE, SUM, MEAN = 0, 1, 2  # Reduction in csrc/cpu/logit_rows.h
CPU = torch.device("cpu")  # named, as dtypes are: a default device or dtype must not reach what C++ writes into


def forward(rows: LogitRows) -> tuple[Tensor, Tensor, float]:
    n = rows.student.shape[0]
    state = torch.empty(n, state_width(len(rows.teachers), rows.standardize), dtype=torch.float64, device=CPU)
    loss = torch.empty(() if rows.reduce else (n,), dtype=torch.float32, device=CPU)
    divisor = _checks.divisor(rows)
    reduction = NONE if not rows.reduce else MEAN if divisor is None else SUM
    numbers = rows.notes = _numbers(rows)
    fault, scale = _C.logit_forward(
        _logits(rows), numbers, reduction, divisor or 0.0, loss.data_ptr(), state.data_ptr()
    )
    if fault:
        _refuse(rows, fault, scale)
    return loss, state, scale


def backward(rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
    student = rows.student
    grad = student if rows.overwrite else torch.empty_like(student, memory_format=torch.contiguous_format)
    _C.logit_backward(
        _logits(rows),
        rows.notes or _numbers(rows),
        state.data_ptr(),
        grad_loss.data_ptr() or _nowhere(grad_loss),
        0 if rows.reduce else grad_loss.stride(0),
        float(scale) if rows.reduce else 1.0,
        grad.data_ptr(),
        grad.stride(0),
        not rows.overwrite,
    )
    return grad


def _logits(rows: LogitRows) -> tuple[int, ...]:
    """Where they are; csrc/bindings.cpp takes both tuples apart in this order."""
    student = rows.student
    n, vocabulary = student.shape
    numbers: tuple[int, ...] = (student.data_ptr() or _nowhere(student), student.stride()[0], n, vocabulary)
    for teacher in rows.teachers:
        numbers += (teacher.data_ptr() or _nowhere(teacher), teacher.stride()[0])
    return numbers


def _numbers(rows: LogitRows) -> tuple[float, ...]:
    """All the rest of a problem, addresses of tensors that `rows` keeps alive among them."""
    target, weight = rows.target, rows.row_weight
    numbers: tuple[float, ...] = (
        DTYPES[rows.student.dtype],
        rows.shared,
        0 if target is None else target.data_ptr() or _nowhere(target),
        rows.ignore_index,
        *(ONE if weight is None else _by_row(weight)),
        *_by_row(rows.alpha),
        *_by_row(rows.temperature),
        DIVERGENCE[rows.divergence],
        rows.beta,
        rows.scale_by_t2,
        rows.label_smoothing,
        rows.z_loss,
        rows.agreement,
        torch.get_num_threads(),
        rows.without_target,
        *(ZERO if rows.label_slope is None else _by_row(rows.label_slope)),
        rows.standardize,
    )
    weights = rows.teacher_weight
    shares: Sequence[float | Tensor] = weights.unbind(1) if isinstance(weights, Tensor) else weights
    for teacher, temperature, share in zip(rows.teachers, rows.teacher_temperature, shares, strict=True):
        numbers += (DTYPES[teacher.dtype], *_by_row(temperature), *_by_row(share))
    return numbers


ZERO, ONE = (0, 0, 0.0), (0, 0, 1.0)


def _by_row(value: float | Tensor) -> tuple[int, int, float]:
    if isinstance(value, Tensor):
        return value.data_ptr() or _nowhere(value), value.stride()[0], 0.0
    return 0, 0, value


def _nowhere(tensor: Tensor) -> int:
    """A null pointer, if that is right: it would crash, or read as an argument that is not there."""
    if tensor.numel() > 0:
        raise ValueError(
            f"fastkd: a tensor of shape {tuple(tensor.shape)} must have memory, got none (freed by resize_?)"
        )
    return 0


def _refuse(rows: LogitRows, fault: int, got: float) -> None:
    if fault == 1:
        _checks.bad_id(rows.op, rows.student.shape[1], rows.ignore_index, int(got))
    argument = "temperature" if fault == 2 else "teacher_temperature"
    _checks.bad_value(rows.op, argument, "be positive and finite in every row", got)
