"""How a loss on features joins the autograd graph: its gradient comes with its value, and backward only scales it.

Eager calls take the autograd.Function; traced, a loss is an operator, since a tracer cannot look into a C++ call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _dispatch
from .._autocast import without_autocast
from .._features import Features, Result
from . import _batch
from ._logit_autograd import NO_SECOND_DERIVATIVE, NoSecondDerivative
from ._logit_operators import nothing

if TYPE_CHECKING:
    from ._batch import Group

Options = dict[str, float | str | Tensor | None]
LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
LIBRARY.define(
    "feature_loss(Tensor student, Tensor teacher, str[] kept_names, Tensor[] kept, str[] number_names, float[] numbers,"
    " str[] word_names, str[] words, str[] tensor_names, Tensor[] tensors, bool gradient, str op, str? impl,"
    " str? group)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def loss_of(
    op: str,
    impl: str | None,
    student: Tensor,
    teacher: Features,
    *,
    group: Group = None,
    **options: float | str | Tensor | None,
) -> Tensor:
    """What ``op`` makes of checked arguments, as a part of the graph.

    With a process group, of the rows of all its ranks. The gradient is that of this rank's rows, times the number of
    ranks: DistributedDataParallel divides by it, and makes of the ranks' sums the gradient of the one loss. So would
    ``torch.distributed.nn.functional.all_gather`` before the loss, with one more collective in backward.
    """
    _batch.check_group(op, group)
    if torch.compiler.is_compiling():
        return _traced(op, impl, student, teacher, options, group)
    loss: Tensor
    loss, _ = LossNode.apply(student, teacher, options, op, impl, group)
    return loss


class LossNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Features, options: Options, op: str, impl: str | None, group: Group
    ) -> tuple[Tensor, Tensor]:
        """The loss, and nothing: an output that says what the gradient is a function of, without the student."""
        loss, gradient = compute(op, impl, Features(student), teacher, ctx.needs_input_grad[0], options, group)
        origin = loss.new_empty(0)
        if gradient is not None:
            ctx.save_for_backward(gradient, origin)
        ctx.dtype = student.dtype
        ctx.set_materialize_grads(False)
        return loss, origin

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None, None, None
        gradient, origin = ctx.saved_tensors
        with torch.no_grad():
            grad = (gradient * grad_loss).to(ctx.dtype)
        if torch.is_grad_enabled():
            grad = NoSecondDerivative.apply(grad, origin)
        return grad, None, None, None, None, None


def compute(
    op: str,
    impl: str | None,
    student: Features,
    teacher: Features,
    gradient: bool,
    options: Options,
    group: Group = None,
) -> Result:
    others = [teacher.tensor, *(value for value in options.values() if isinstance(value, Tensor))]
    floats = [tensor for tensor in others if tensor.is_floating_point()]
    implementation = getattr(_dispatch.pick(op, impl, student.tensor, floats), op)
    own = student.tensor
    if group is not None:
        whole, teacher, first = _batch.gather(op, own, teacher.tensor, group)
        student = Features(whole)
    with without_autocast(student.tensor.device):  # its matrix products would round the features
        loss, slope = implementation(student, teacher, gradient, **options)
    if group is not None and slope is not None:
        slope = slope[first : first + len(own)] * dist.get_world_size(group)
    return loss, slope


def _traced(op: str, impl: str | None, student: Tensor, teacher: Features, options: Options, group: Group) -> Tensor:
    numbers = {name: float(x) for name, x in options.items() if isinstance(x, (int, float))}
    words = {name: x for name, x in options.items() if isinstance(x, str)}
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    gradient = torch.is_grad_enabled() and student.requires_grad
    loss: Tensor
    loss, _ = torch.ops.fastkd.feature_loss(
        student, teacher.tensor, list(teacher.kept), list(teacher.kept.values()),
        list(numbers), list(numbers.values()), list(words), list(words.values()), list(tensors), list(tensors.values()),
        gradient, op, impl, None if group is None else group.group_name,
    )  # fmt: skip
    return loss


@torch.library.impl(LIBRARY, "feature_loss", "CompositeExplicitAutograd")
def _forward(
    student: Tensor,
    teacher: Tensor,
    kept_names: list[str],
    kept: list[Tensor],
    number_names: list[str],
    numbers: list[float],
    word_names: list[str],
    words: list[str],
    tensor_names: list[str],
    tensors: list[Tensor],
    gradient: bool,
    op: str,
    impl: str | None,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    taught = Features(teacher, dict(zip(kept_names, kept, strict=True)))
    options: Options = {
        **dict(zip(number_names, numbers, strict=True)),
        **dict(zip(word_names, words, strict=True)),
        **dict(zip(tensor_names, tensors, strict=True)),
    }
    loss, slope = compute(op, impl, Features(student), taught, gradient, options, _batch.by_name(group))
    wanted = loss.new_empty(student.shape if gradient else (0,))
    return loss, wanted if slope is None else slope.to(loss.dtype).contiguous()


@torch.library.register_fake("fastkd::feature_loss", lib=LIBRARY)
def _fake(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, gradient = arguments[-5], arguments[-4]
    wide = any(x.dtype is torch.float64 for x in (student, teacher, *tensors))
    dtype = torch.float64 if wide else torch.float32
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if gradient else (0,), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.constants = inputs[0].dtype, [nothing(value) for value in inputs[1:]]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_loss: Tensor | None, grad_gradient: Tensor | None) -> tuple[Any, ...]:
    if grad_gradient is not None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    (gradient,) = ctx.saved_tensors
    grad = None if grad_loss is None else (gradient * grad_loss).to(ctx.dtype)
    return grad, *ctx.constants


torch.library.register_autograd("fastkd::feature_loss", _gradient, setup_context=_setup_context, lib=LIBRARY)
