"""How a loss on attention scores joins the autograd graph in eager mode. (Traced, it is an operator:
``_attention_operators.py``.)"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._attention import AttentionRows
from ._logit_autograd import NoSecondDerivative

MASKS = ("key_mask", "query_mask")
CONSTANTS = ("teacher_queries", "teacher_keys", *MASKS)


@dataclass(slots=True)
class Pending:
    """One call on its way through the graph. After forward it holds no tensor that autograd has saved."""

    rows: AttentionRows
    implementation: Any
    state: Any = field(default=None, init=False)
    scale: Any = field(default=None, init=False)


class AttentionLoss(torch.autograd.Function):
    """Saves queries and keys as the caller passed them, and a few numbers a row."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor | None, pending: Pending) -> Tensor:
        rows = pending.rows
        loss: Tensor
        loss, pending.state, pending.scale = pending.implementation.forward(laid(rows, queries, keys))
        # Autograd saves no tensor of inference mode, and nobody outside that mode can change one.
        saved = [getattr(rows, name) for name in CONSTANTS]
        kept = [None if x is None or not x.is_inference() else x for x in saved]
        ctx.save_for_backward(queries, keys, *(x if y is None else None for x, y in zip(saved, kept, strict=True)))
        gone: dict[str, Any] = {
            "student_queries": None,
            "student_keys": None,
            **dict(zip(CONSTANTS, kept, strict=True)),
        }
        pending.rows = replace(rows, **gone)
        ctx.set_materialize_grads(False)
        ctx.pending = pending
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad_loss is None:
            return None, None, None
        if not torch.is_grad_enabled():
            return (*_gradients(ctx, grad_loss), None)
        with torch.no_grad():
            gradients = _gradients(ctx, grad_loss)
        of = ctx.saved_tensors[:2]
        of_queries, of_keys = (x if x is None else NoSecondDerivative.apply(x, *of) for x in gradients)
        return of_queries, of_keys, None


def laid(rows: AttentionRows, queries: Tensor, keys: Tensor | None) -> AttentionRows:
    """As an implementation reads them: a copy only where the last dimension's stride is not 1."""
    queries = _dense(queries)
    masks: dict[str, Any] = {name: _contiguous(getattr(rows, name)) for name in MASKS}
    return replace(
        rows,
        student_queries=queries,
        student_keys=queries if keys is None else _dense(keys),
        teacher_queries=_dense(rows.teacher_queries),
        teacher_keys=_dense(rows.teacher_keys),
        **masks,
    )


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _dense(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    pending: Pending = ctx.pending
    queries, keys, *saved = ctx.saved_tensors
    constants: dict[str, Any] = {name: x for name, x in zip(CONSTANTS, saved, strict=True) if x is not None}
    rows = laid(replace(pending.rows, **constants), queries, keys)
    wanted = ctx.needs_input_grad[:2]
    gradients: tuple[Tensor | None, Tensor | None]
    gradients = pending.implementation.backward(rows, pending.state, pending.scale, grad_loss.resolve_neg(), wanted)
    return gradients
