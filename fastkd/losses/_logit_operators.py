"""The logit losses as operators, for ``torch.compile`` and ``torch.export``: a tracer cannot look into a C++ call.

Eager calls take the autograd.Function of ``_logit_autograd.py`` instead: an operator with a registered gradient costs
2.5 times as much (48 us against 19 for a forward and backward that compute nothing, torch 2.13 on a CPU).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .._rows import LogitRows
from ._arrangement import state_columns, term
from ._logit_autograd import NO_SECOND_DERIVATIVE

# The fields of LogitRows. A number that may vary by row is a pair: `x_rows`, or else `x`.
PROBLEM = """
    Tensor student, Tensor[] teachers, Tensor? target, Tensor? row_weight,
    Tensor? alpha_rows, float alpha, Tensor? temperature_rows, float temperature,
    Tensor[] teacher_temperature_rows, float[] teacher_temperature, Tensor? teacher_weight_rows, float[] teacher_weight,
    Tensor? divisor_tensor, float? divisor, str divergence, float beta, bool scale_by_t2, float label_smoothing,
    float z_loss, int ignore_index, SymInt shared, bool reduce, bool agreement, bool standardize,
    float label_weight, str op, str? impl
"""
OPTIONS = (
    "divergence", "beta", "scale_by_t2", "label_smoothing", "z_loss", "ignore_index", "shared", "reduce", "agreement",
    "standardize", "label_weight", "op",
)  # fmt: skip
LIBRARY = torch.library.Library("fastkd", "DEF")
LIBRARY.define(f"logit_forward({PROBLEM}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    f"logit_backward(Tensor grad_loss, Tensor state, Tensor scale, {PROBLEM}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(rows: LogitRows, impl: str | None) -> tuple[Tensor, Tensor]:
    """Loss and state, as LogitLoss.apply gives them."""
    loss, state, _ = torch.ops.fastkd.logit_forward(*pack(rows), impl)
    return loss, state


def pack(rows: LogitRows) -> list[Any]:
    teacher_temperature = [_pair(value) for value in rows.teacher_temperature]
    by_row = [value for value, _ in teacher_temperature if value is not None]
    if by_row and len(by_row) < len(teacher_temperature):
        by_row = [by_row[0].new_full(by_row[0].shape, x) if rows is None else rows for rows, x in teacher_temperature]
    weights = rows.teacher_weight
    return [
        rows.student,
        [teacher.detach() for teacher in rows.teachers],
        rows.target,
        rows.row_weight,
        *_pair(rows.alpha),
        *_pair(rows.temperature),
        by_row,
        [] if by_row else [value for _, value in teacher_temperature],
        *((weights, []) if isinstance(weights, Tensor) else (None, list(weights))),
        *((rows.divisor, None) if isinstance(rows.divisor, Tensor) else (None, rows.divisor)),
        *(getattr(rows, name) for name in OPTIONS),
    ]


def _pair(value: float | Tensor) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, value)


def unpack(
    student: Tensor,
    teachers: list[Tensor],
    target: Tensor | None,
    row_weight: Tensor | None,
    alpha_rows: Tensor | None,
    alpha: float,
    temperature_rows: Tensor | None,
    temperature: float,
    teacher_temperature_rows: list[Tensor],
    teacher_temperature: list[float],
    teacher_weight_rows: Tensor | None,
    teacher_weight: list[float],
    divisor_tensor: Tensor | None,
    divisor: float | None,
    *options: Any,
) -> LogitRows:
    return LogitRows(
        student=student,
        teachers=tuple(teachers),
        target=target,
        row_weight=row_weight,
        alpha=alpha if alpha_rows is None else alpha_rows,
        temperature=temperature if temperature_rows is None else temperature_rows,
        teacher_temperature=tuple(teacher_temperature_rows or teacher_temperature),
        teacher_weight=tuple(teacher_weight) if teacher_weight_rows is None else teacher_weight_rows,
        divisor=divisor if divisor_tensor is None else divisor_tensor,
        overwrite=False,  # an operator's gradient is memory of its own
        **dict(zip(OPTIONS, options, strict=True)),
    )


@torch.library.impl(LIBRARY, "logit_forward", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *problem, impl = arguments
    rows = unpack(*problem)
    loss, state, scale = term(impl, rows.student, rows.teachers, rows).forward(rows)
    return loss, state, state.new_full((), scale) if isinstance(scale, float) else scale


@torch.library.impl(LIBRARY, "logit_backward", "CompositeExplicitAutograd")
def _backward(grad_loss: Tensor, state: Tensor, scale: Tensor, *arguments: Any) -> Tensor:
    *problem, impl = arguments
    rows = unpack(*problem)
    grad = term(impl, rows.student, rows.teachers, rows).backward(rows, state, scale, grad_loss)
    return grad.contiguous()  # as the fake one is, whatever alignment made a kernel choose


@torch.library.register_fake("fastkd::logit_forward", lib=LIBRARY)
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = unpack(*arguments[:-1])
    wide = any(x.dtype == torch.float64 for x in (rows.student, *rows.teachers))
    dtype, n = torch.float64 if wide else torch.float32, rows.student.shape[0]
    empty = rows.student.new_empty
    state = empty((n, state_columns(rows, len(rows.teachers))), dtype=torch.float64)
    return empty(() if rows.reduce else (n,), dtype=dtype), state, empty((), dtype=torch.float64)


@torch.library.register_fake("fastkd::logit_backward", lib=LIBRARY)
def _fake_backward(grad_loss: Tensor, state: Tensor, scale: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    leaves, ctx.structure = pytree.tree_flatten(list(inputs))
    ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    ctx.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    ctx.save_for_backward(*output[1:], *(leaves[i] for i in ctx.tensors))
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    state, scale, *saved = ctx.saved_tensors
    leaves = list(ctx.leaves)
    for i, tensor in zip(ctx.tensors, saved, strict=True):
        leaves[i] = tensor
    inputs = pytree.tree_unflatten(leaves, ctx.structure)
    grad = None if grad_loss is None else torch.ops.fastkd.logit_backward(grad_loss, state, scale, *inputs)
    return grad, *map(nothing, inputs[1:])


def nothing(value: Any) -> Any:
    """The gradient of a constant: None, or a list of None for a list of tensors (which an empty one is)."""
    if isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
        return [None] * len(value)
    return None


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


torch.library.register_autograd("fastkd::logit_forward", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastkd::logit_backward", _no_second_derivative, lib=LIBRARY)
