"""How a matrix over all pairs of rows joins the autograd graph: both batches of rows get a gradient.

Eager calls take the autograd.Function; traced, forward and backward are operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._autocast import without_autocast
from .._matrices import result_dtype
from ._logit_autograd import NO_SECOND_DERIVATIVE, NoSecondDerivative

LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
LIBRARY.define(
    "pair_matrix(Tensor x, Tensor? y, bool squared, str op, str? impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "pair_matrix_backward(Tensor grad, Tensor matrix, Tensor x, Tensor? y, bool squared, str op, str? impl)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def matrix_of(op: str, impl: str | None, x: Tensor, y: Tensor | None, squared: bool = False) -> Tensor:
    """What ``op`` makes of checked arguments, as a part of the graph."""
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.fastkd.pair_matrix(x, y, squared, op, impl)
        return traced
    matrix: Tensor = PairMatrix.apply(x, y, squared, op, impl)
    return matrix


class PairMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, squared: bool, op: str, impl: str | None) -> Tensor:
        matrix = _forward(x, y, squared, op, impl)
        ctx.save_for_backward(x, y, matrix)
        ctx.call = squared, op, impl
        ctx.set_materialize_grads(False)
        return matrix

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None, None
        x, y, matrix = ctx.saved_tensors
        with torch.no_grad():
            of_x, of_y = _gradients(grad.detach(), matrix.detach(), x.detach(), y, *ctx.call)
        slopes = [None if slope is None else _rounded(slope, z, x, y) for slope, z in ((of_x, x), (of_y, y))]
        mine, others = (slope if wanted else None for slope, wanted in zip(slopes, ctx.needs_input_grad, strict=False))
        return mine, others, None, None, None


def _rounded(slope: Tensor, like: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
    slope = slope.to(like.dtype)
    return NoSecondDerivative.apply(slope, x, y) if torch.is_grad_enabled() else slope


def _forward(x: Tensor, y: Tensor | None, squared: bool, op: str, impl: str | None) -> Tensor:
    implementation = _dispatch.pick(op, impl, x, () if y is None else (y,))
    with without_autocast(x.device):  # its matrix products would round the rows
        matrix: Tensor = implementation.forward(x.detach(), None if y is None else y.detach(), squared)
    return matrix


def _gradients(
    grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool, op: str, impl: str | None
) -> tuple[Tensor, Tensor | None]:
    implementation = _dispatch.pick(op, impl, x, () if y is None else (y,))
    y = None if y is None else y.detach()
    with without_autocast(x.device):
        slopes: tuple[Tensor, Tensor | None] = implementation.backward(grad, matrix, x, y, squared)
    return slopes


torch.library.impl(LIBRARY, "pair_matrix", "CompositeExplicitAutograd")(_forward)


@torch.library.impl(LIBRARY, "pair_matrix_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, squared: bool, op: str, impl: str | None
) -> tuple[Tensor, Tensor]:
    of_x, of_y = _gradients(grad, matrix, x, y, squared, op, impl)
    if y is None or of_y is None:
        return of_x.to(x.dtype).contiguous(), x.new_empty(0)
    return of_x.to(x.dtype).contiguous(), of_y.to(y.dtype).contiguous()


@torch.library.register_fake("fastkd::pair_matrix", lib=LIBRARY)
def _fake(x: Tensor, y: Tensor | None, squared: bool, op: str, impl: str | None) -> Tensor:
    columns = x.shape[0] if y is None else y.shape[0]
    return x.new_empty((x.shape[0], columns), dtype=result_dtype(x, y))


@torch.library.register_fake("fastkd::pair_matrix_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, matrix: Tensor, x: Tensor, y: Tensor | None, *call: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *ctx.call = inputs
    ctx.save_for_backward(x, y, output)


def _slopes(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    x, y, matrix = ctx.saved_tensors
    if grad.requires_grad:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    of_x, of_y = torch.ops.fastkd.pair_matrix_backward(grad, matrix, x, y, *ctx.call)
    return of_x, None if y is None else of_y, None, None, None


torch.library.register_autograd("fastkd::pair_matrix", _slopes, setup_context=_setup_context, lib=LIBRARY)
