"""Argument checks and the wording of their messages: ``<op>: <argument> must <rule>, got <value>``.

ValueError for shapes and values, TypeError for types and dtypes. All of them run before a pointer is taken; what can
only be seen by reading the data is checked on the CPU alone (by the native kernels, or by :func:`row_data`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._rows import LogitRows

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def bad_value(op: str, argument: str, rule: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} must {rule}, got {got}")


def bad_type(op: str, argument: str, rule: str, got: object) -> NoReturn:
    raise TypeError(f"{op}: {argument} must {rule}, got {got}")


def logits(op: str, argument: str, value: Any, accepted: str) -> None:
    floats(op, argument, value, accepted)
    if value.ndim == 0:
        bad_value(op, argument, "have a class dimension", "a 0-dim tensor")


def floats(op: str, argument: str, value: Any, accepted: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        bad_type(op, argument, f"be {accepted}", type(value).__name__)
    if value.dtype not in FLOATS:
        bad_type(op, argument, "be float16, bfloat16, float32 or float64", value.dtype)
    if value.layout is not torch.strided:
        bad_type(op, argument, "be a dense (strided) tensor", value.layout)


def dimension(op: str, dim: int, ndim: int) -> int:
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        bad_value(op, "dim", f"be an integer from {-ndim} to {ndim - 1}", repr(dim))
    return dim % ndim


def same_device(op: str, argument: str, value: Any, student: Tensor) -> None:
    if value.device != student.device:
        bad_value(op, argument, f"be on the student's device, {student.device}", value.device)


def choice(op: str, argument: str, value: Any, names: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in names:
        bad_value(op, argument, f"be one of {', '.join(names)}", repr(value))


def number(op: str, argument: str, value: Any, rule: str = "be a number") -> float:
    if isinstance(value, float):
        return value
    if not isinstance(value, (int, numbers.Real)):
        bad_type(op, argument, rule, type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        return math.inf  # for whoever called to refuse


def count(op: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type(op, argument, "be an integer", type(value).__name__)
    if value < 1:
        bad_value(op, argument, "be positive", value)
    return value


def fraction(op: str, argument: str, value: Any) -> float:
    got = number(op, argument, value)
    if not 0 <= got <= 1:
        bad_value(op, argument, "be from 0 to 1", got)
    return got


def finite(op: str, argument: str, value: Any) -> float:
    got = number(op, argument, value)
    if not -math.inf < got < math.inf:  # traced, a number may be one that math.isfinite does not take
        bad_value(op, argument, "be finite", got)
    return got


def positive(op: str, argument: str, value: Any) -> float:
    got = number(op, argument, value, "be a number or a tensor with one number per row")
    if not TINY <= got <= HUGE:
        bad_value(op, argument, "be positive and finite in float32", got)
    return got


def not_negative(op: str, argument: str, value: Any) -> float:
    got = number(op, argument, value)
    if not 0 <= got < math.inf:
        bad_value(op, argument, "be finite and not negative", got)
    return got


def row_tensor(
    op: str, argument: str, value: Any, student: Tensor, shape: Sequence[int], rows: int, dtype: torch.dtype
) -> Tensor:
    """One number per row, as a flat tensor; a 0-dim tensor holds for every row."""
    if not isinstance(value, Tensor):
        bad_type(op, argument, "be a tensor with one number per row", type(value).__name__)
    constant(op, argument, value)
    same_device(op, argument, value, student)
    if value.ndim == 0:
        return value.detach().to(dtype).expand(rows)
    if value.shape != tuple(shape):
        bad_value(op, argument, f"have the shape of the rows, {tuple(shape)}", tuple(value.shape))
    return value.detach().reshape(-1).to(dtype)


def constant(op: str, argument: str, value: Tensor) -> None:
    if value.is_complex():
        bad_type(op, argument, "be real", value.dtype)
    if value.requires_grad:
        bad_value(
            op, argument, "not require a gradient (it would get none): pass argument.detach()", "requires_grad=True"
        )


def target(op: str, value: Any, student: Tensor, shape: Sequence[int]) -> Tensor:
    if not isinstance(value, Tensor):
        bad_type(op, "target", "be a tensor of class ids", type(value).__name__)
    if value.dtype not in INTEGERS:
        bad_type(op, "target", "hold integer class ids", value.dtype)
    if value.shape != tuple(shape):
        bad_value(op, "target", f"have the shape of the rows, {tuple(shape)}", tuple(value.shape))
    same_device(op, "target", value, student)
    if value.ndim == 1 and value.dtype is torch.int64 and value.is_contiguous():
        return value
    return value.reshape(-1).to(torch.int64).contiguous()


def divisor(rows: LogitRows) -> float | None:
    """The number that it is, on the CPU; None for the sum of the weights."""
    if rows.divisor is None or isinstance(rows.divisor, float):
        return rows.divisor
    got = float(rows.divisor)
    if not 0 <= got < math.inf:
        bad_value(rows.op, "normalizer", "be finite and not negative", got)
    return got


def row_data(rows: LogitRows, vocabulary: int) -> None:
    """What only the data shows, where the implementation does not look itself, or sees some rows alone."""
    op = rows.op
    divisor(rows)
    if rows.target is not None:
        outside = (rows.target != rows.ignore_index) & ((rows.target < 0) | (rows.target >= vocabulary))
        if bool(outside.any()):
            bad_id(op, vocabulary, rows.ignore_index, int(rows.target[outside][0]))
    teachers = [("teacher_temperature", value) for value in rows.teacher_temperature]
    for argument, value in [("temperature", rows.temperature), *teachers]:
        if isinstance(value, Tensor):
            wrong = ~((value > 0) & (value < math.inf))
            if bool(wrong.any()):
                bad_value(op, argument, "be positive and finite in every row", float(value[wrong][0]))


def bad_id(op: str, vocabulary: int, ignore_index: int, got: int) -> NoReturn:
    bad_value(op, "target", f"hold ids from 0 to {vocabulary - 1}, or ignore_index={ignore_index}", got)
