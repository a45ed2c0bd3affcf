"""The losses on attention scores as operators, for ``torch.compile`` and ``torch.export``; eager calls take the
autograd.Function of ``_attention_autograd.py``, which costs less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._attention import STATE_WIDTH, AttentionRows
from ._attention_autograd import laid
from ._logit_autograd import NO_SECOND_DERIVATIVE

# The fields of AttentionRows. Without keys they are the queries.
PROBLEM = """
    Tensor queries, Tensor? keys, Tensor teacher_queries, Tensor teacher_keys, Tensor? key_mask, Tensor? query_mask,
    bool causal, float scale, float teacher_scale, SymInt? divisor, bool reduce, str? impl
"""
OP = "attention_kl_loss"
LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
LIBRARY.define(f"attention_forward({PROBLEM}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    "attention_backward(Tensor grad_loss, Tensor state, Tensor loss_scale, bool[] wanted, "
    f"{PROBLEM}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(rows: AttentionRows, impl: str | None) -> Tensor:
    """The loss, as AttentionLoss.apply gives it."""
    keys = None if rows.same else rows.student_keys
    constants = rows.teacher_queries.detach(), rows.teacher_keys.detach(), rows.key_mask, rows.query_mask
    numbers = rows.causal, rows.scale, rows.teacher_scale, rows.divisor, rows.reduce
    loss: Tensor = torch.ops.fastkd.attention_forward(rows.student_queries, keys, *constants, *numbers, impl)[0]
    return loss


def _problem(
    queries: Tensor, keys: Tensor | None, teacher_queries: Tensor, teacher_keys: Tensor, *rest: Any
) -> tuple[AttentionRows, Any]:
    *fields, impl = rest
    rows = AttentionRows(queries, queries, teacher_queries, teacher_keys, *fields, keys is None)  # type: ignore[call-arg]
    return laid(rows, queries, keys), _dispatch.pick(OP, impl, queries, (teacher_queries,))


@torch.library.impl(LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, implementation = _problem(*arguments)
    loss, state, scale = implementation.forward(rows)
    return loss, state, state.new_full((), scale) if isinstance(scale, float) else scale


@torch.library.impl(LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad_loss: Tensor, state: Tensor, scale: Tensor, wanted: tuple[bool, bool], *arguments: Any
) -> tuple[Tensor, Tensor]:
    rows, implementation = _problem(*arguments)
    gradients = implementation.backward(rows, state, scale, grad_loss, wanted)
    nothing = state.new_empty(0, dtype=rows.student_queries.dtype)
    of_queries, of_keys = (nothing if x is None else x.contiguous() for x in gradients)
    return of_queries, of_keys.clone() if of_keys is of_queries else of_keys


@torch.library.register_fake("fastkd::attention_forward", lib=LIBRARY)
def _fake_forward(queries: Tensor, keys: Tensor | None, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 in (queries.dtype, teacher.dtype)
    *_, reduce, _ = rest
    rows, empty = queries.shape[:3], queries.new_empty
    loss = empty(() if reduce else rows, dtype=torch.float64 if wide else torch.float32)
    return loss, empty((*rows, STATE_WIDTH), dtype=torch.float64), empty((), dtype=torch.float64)


@torch.library.register_fake("fastkd::attention_backward", lib=LIBRARY)
def _fake_backward(
    grad_loss: Tensor, state: Tensor, scale: Tensor, wanted: tuple[bool, bool], queries: Tensor, keys: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of_queries = queries.new_empty(queries.shape if wanted[0] or keys is None else 0)
    return of_queries, queries.new_empty(0 if keys is None or not wanted[1] else keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.rest = inputs[6:]
    ctx.save_for_backward(*output[1:], *inputs[:6])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (4 + len(ctx.rest))
    if grad_loss is None:
        return None, None, *nothing
    wanted = list(ctx.needs_input_grad[:2])
    state, scale, queries, keys, *constants = ctx.saved_tensors
    problem = queries, keys, *constants, *ctx.rest
    of_queries, of_keys = torch.ops.fastkd.attention_backward(grad_loss, state, scale, wanted, *problem)
    return of_queries if wanted[0] else None, of_keys if keys is not None and wanted[1] else None, *nothing


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


torch.library.register_autograd("fastkd::attention_forward", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastkd::attention_backward", _no_second_derivative, lib=LIBRARY)
