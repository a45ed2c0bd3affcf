"""How a loss that is computed a few rows at a time joins the autograd graph in eager mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autocast import without_autocast
from .._rows import LogitRows
from ..inputs import Head, TopK
from ._chunks import Chunks
from ._logit_arguments import Given, Logits, tensors_of
from ._logit_autograd import MODIFIED, NoSecondDerivative, unflatten
from ._sources import autocast_dtype


class Template:
    """A student or teacher without its tensors: those are autograd's to keep."""

    def __init__(self, given: Given) -> None:
        self.kind = type(given) if isinstance(given, (Head, TopK)) else Tensor
        self.options = given.options() if isinstance(given, (Head, TopK)) else {}
        self.names = given.names() if isinstance(given, (Head, TopK)) else ()

    def fill(self, tensors: Iterator[Tensor]) -> Given:
        if self.kind is Tensor:
            return next(tensors)
        arguments: dict[str, Any] = {name: next(tensors) for name in self.names}
        return self.kind(**arguments, **self.options)


class Call:
    """What a graph node keeps of a call. None of it is a tensor of the caller's, but for those of inference mode."""

    __slots__ = ("chunks", "constants", "held", "kept", "state", "student", "templates", "wanted")

    state: Tensor

    def __init__(self, chunks: Chunks, constants: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        given = (chunks.student, *chunks.teachers)
        self.chunks, self.wanted = chunks, tuple(wanted)
        self.constants = [(x, x._version) for x in constants if not x.is_inference()]
        self.templates = [Template(one) for one in given]
        self.student = [(x.shape, x.dtype) for x in tensors_of(chunks.student)]
        tensors = [x for one in given for x in tensors_of(one)]
        self.held = [x if x.is_inference() else None for x in tensors]  # autograd takes none; nobody changes them
        self.kept: tuple[list[Tensor | None], Tensor] | None = None

    def restore(self, saved: Iterable[Tensor]) -> None:
        for constant, version in self.constants:
            if constant._version != version:
                raise RuntimeError(MODIFIED)
        rest = iter(saved)
        tensors = iter([next(rest) if x is None else x for x in self.held])
        student, *teachers = [template.fill(tensors) for template in self.templates]
        assert isinstance(student, (Tensor, Head))
        self.chunks.student, self.chunks.teachers = student, tuple(teachers)


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        """``tensors``: the student's, then the teachers', for autograd to see."""
        chunks = call.chunks
        with without_autocast(chunks.device):
            loss, call.state = chunks.forward(call.wanted, dtype)
        gradients = chunks.release()
        if chunks.rows.reduce and any(call.wanted):
            call.kept = gradients, chunks.outside()
        ctx.save_for_backward(*(x for x, held in zip(tensors, call.held, strict=True) if held is None))
        ctx.set_materialize_grads(False)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        teachers = [None] * (len(call.held) - len(call.wanted))
        if grad_loss is None:
            return None, None, *[None] * len(call.wanted), *teachers
        with torch.no_grad(), without_autocast(call.chunks.device):
            gradients = _gradients(ctx, call, grad_loss.resolve_neg())
        if torch.is_grad_enabled():
            of = [x for x in ctx.saved_tensors if x.requires_grad]
            gradients = [x if x is None else NoSecondDerivative.apply(x, *of) for x in gradients]
        return None, None, *gradients, *teachers


def apply(
    logits: Logits, rows: LogitRows, teachers: Sequence[Given], impl: str | None, student_topk: int | None
) -> tuple[Tensor, Tensor]:
    """Loss and state."""
    chunks = Chunks(
        rows,
        logits.student,
        teachers,
        impl=impl,
        dim=logits.dim,
        autocast=autocast_dtype(logits.anchor.device),
        vocab_map=logits.vocab_map,
        student_topk=student_topk,
    )
    of_student = tensors_of(logits.student)
    tensors = [*of_student, *(x.detach() for one in teachers for x in tensors_of(one))]  # a teacher is a constant
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in of_student]
    call = Call(chunks, logits.constants, wanted)
    loss = ChunkedLoss.apply(call, logits.dtype, *tensors)
    return loss, call.state


def _gradients(ctx: Any, call: Call, grad_loss: Tensor) -> list[Tensor | None]:
    if call.kept is not None:
        (gradients, outside), call.kept = call.kept, None
        upstream = grad_loss * outside
    else:
        call.restore(ctx.saved_tensors)
        call.chunks.again(call.wanted, call.state, grad_loss)
        gradients, upstream = call.chunks.release(), None
    finished = []
    for gradient, (shape, dtype) in zip(gradients, call.student, strict=True):
        if gradient is not None:
            gradient = _scaled(gradient, upstream, dtype)
            of_logits = call.templates[0].kind is Tensor
            gradient = unflatten(gradient, shape, call.chunks.dim) if of_logits else gradient.view(shape)
        finished.append(gradient)
    return finished


def _scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In place where it can be, since the gradient of a weight may be as large as all that was computed for it."""
    if factor is None or (not factor.is_cuda and float(factor) == 1):
        return gradient.to(dtype)
    if gradient.dtype is dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
