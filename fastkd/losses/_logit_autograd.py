"""How a logit loss joins the autograd graph in eager mode. (Traced, it is an operator: ``_logit_operators.py``.)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._rows import LogitRows

MODIFIED = (
    "fastkd: a teacher, a target, or weights, alpha or temperatures, were modified in place before backward needed them"
)
NO_SECOND_DERIVATIVE = "fastkd: its losses have no second derivative"


def flatten(logits: Tensor, dim: int) -> Tensor:
    """Rows of logits with the class dimension last and unit stride; a copy only where the layout forces one."""
    if dim != logits.ndim - 1:
        logits = logits.movedim(dim, -1)
    if logits.ndim != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def unflatten(grad: Tensor, shape: torch.Size, dim: int) -> Tensor:
    if dim == len(shape) - 1:
        return grad if len(shape) == 2 else grad.view(shape)
    return grad.view(*shape[:dim], *shape[dim + 1 :], shape[dim]).movedim(-1, dim)


class Pending:
    """One call on its way through the graph: the problem without its logits, and what forward found out."""

    __slots__ = ("constants", "dim", "held", "implementation", "rows", "scale", "state")

    rows: LogitRows
    constants: list[tuple[Tensor, int]]  # what backward reads beside the logits, and its version
    dim: int
    implementation: Any  # a module, or a Term
    state: Tensor
    scale: float | Tensor
    held: tuple[Tensor, ...] | None


class LogitLoss(torch.autograd.Function):
    """Saves what the caller passed, not flattened copies: nothing of size (N, V) is kept for backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teachers: tuple[Tensor, ...], pending: Pending) -> Tensor:
        rows = pending.rows
        lay(rows, student, teachers, pending.dim)
        loss: Tensor
        loss, pending.state, pending.scale = pending.implementation.forward(rows)
        del rows.student, rows.teachers
        pending.held = None
        for teacher in teachers:
            if teacher.is_inference():  # autograd saves no such tensor, which nobody can change outside that mode
                pending.held = teachers
        if pending.held is None:
            ctx.save_for_backward(student, *teachers)
        else:
            ctx.save_for_backward(student)
            pending.constants += [(x, x._version) for x in teachers if not x.is_inference()]
        ctx.set_materialize_grads(False)
        ctx.pending = pending
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None
        if not torch.is_grad_enabled():
            return _gradient(ctx, grad_loss), None, None
        student = ctx.saved_tensors[0]
        with torch.no_grad():
            grad = _gradient(ctx, grad_loss)
        return NoSecondDerivative.apply(grad, student), None, None


def lay(rows: LogitRows, student: Tensor, teachers: Iterable[Tensor], dim: int) -> None:
    """Rows of logits, as an implementation reads them; the rest of the problem knows no layout."""
    rows.student = flatten(student, dim)
    rows.teachers = tuple([flatten(teacher, dim) for teacher in teachers])


def _gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    pending: Pending = ctx.pending
    rows = pending.rows
    student, *teachers = ctx.saved_tensors
    if grad_loss.is_neg():
        grad_loss = grad_loss.resolve_neg()
    for constant, version in pending.constants:
        if constant._version != version:
            raise RuntimeError(MODIFIED)
    # What is handed down is no part of the graph, though it may lie in the student's memory.
    lay(rows, student.detach() if rows.overwrite else student, pending.held or teachers, pending.dim)
    grad: Tensor = pending.implementation.backward(rows, pending.state, pending.scale, grad_loss)
    del rows.student, rows.teachers
    if rows.overwrite:
        # From here on the logits are the gradient: whoever saved them gets autograd's version error.
        torch.autograd.graph.increment_version(student)
    return unflatten(grad, student.shape, pending.dim)


class NoSecondDerivative(torch.autograd.Function):
    """Raises where a gradient is differentiated: as a constant it would be dropped from a gradient penalty silently.

    So would it where nothing leads from it to what it is a function of: ``torch.autograd.grad`` goes only there.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *of: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
