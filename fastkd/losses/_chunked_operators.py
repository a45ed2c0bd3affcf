"""A loss that is computed a few rows at a time, as an operator for ``torch.compile`` and ``torch.export``.

What makes up the student and the teachers comes as one list of tensors, and one string that says how to put them
together again. Gradients that forward computed are results like the loss: a graph has no second way to keep them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autocast import without_autocast
from .._rows import ExpectedTeacher, LogitRows, SparseTeacher
from ..inputs import Head, TopK
from ._arrangement import state_columns
from ._chunks import Chunks
from ._logit_arguments import Given, Logits, tensors_of
from ._logit_autograd import NO_SECOND_DERIVATIVE, unflatten
from ._logit_operators import LIBRARY, PROBLEM, nothing, pack, unpack
from ._sources import autocast_dtype

KINDS = {"Tensor": Tensor, "Head": Head, "TopK": TopK}
MOST = 3  # tensors that a student consists of, and so gradients

ARGUMENTS = f"{PROBLEM}, Tensor[] tensors, Tensor? vocab_map, str spec"
LIBRARY.define(
    f"chunked_forward({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"chunked_backward(Tensor grad_loss, Tensor state, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

LIBRARY.define(
    "chunked_scale(Tensor gradient, Tensor grad_loss, Tensor outside, Tensor source) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(
    logits: Logits, rows: LogitRows, teachers: Sequence[Given], impl: str | None, student_topk: int | None
) -> tuple[Tensor, Tensor]:
    """Loss and state."""
    given = (logits.student, *teachers)
    tensors = [x for one in given for x in tensors_of(one)]
    spec: dict[str, Any] = {
        "given": [[_kind(one), _names(one), _options(one)] for one in given],
        "wanted": [torch.is_grad_enabled() and x.requires_grad for x in tensors_of(logits.student)],
        "wide": logits.dtype is torch.float64,
        "dim": logits.dim,
        "autocast": _name(autocast_dtype(logits.anchor.device)),
        "student_topk": student_topk,
        "sparse": [],
        "expected": [],
    }
    for sparse in rows.sparse:
        spec["sparse"].append([sparse.tail, _number(sparse.weight)])
        tensors += [sparse.indices, sparse.log_probs, *_tensor(sparse.weight)]
    for one in rows.expected:
        spec["expected"].append([one.bias is not None, one.entropy is not None, one.checksum, _number(one.weight)])
        tensors += [one.mean, *(x for x in (one.bias, one.entropy) if x is not None), *_tensor(one.weight)]
    rows.student, rows.teachers = logits.anchor.detach(), ()  # the first has its place among the tensors
    problem = [*pack(rows), impl]
    loss, state, *_ = torch.ops.fastkd.chunked_forward(*problem, tensors, logits.vocab_map, repr(spec))
    return loss, state


def _kind(given: Given) -> str:
    return "Tensor" if isinstance(given, Tensor) else type(given).__name__


def _names(given: Given) -> tuple[str, ...]:
    return given.names() if isinstance(given, (Head, TopK)) else ("",)


def _options(given: Given) -> dict[str, Any]:
    return given.options() if isinstance(given, (Head, TopK)) else {}


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else "bfloat16" if dtype is torch.bfloat16 else "float16"


def _number(value: float | Tensor) -> float | None:
    return None if isinstance(value, Tensor) else value


def _tensor(value: float | Tensor) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else []


def _chunks(arguments: Sequence[Any]) -> tuple[Chunks, dict[str, Any]]:
    *problem, impl, tensors, vocab_map, text = arguments
    spec, rest = ast.literal_eval(text), iter(tensors)
    rows = unpack(*problem)
    student, *teachers = (
        _filled(KINDS[kind], {name: next(rest) for name in names}, options) for kind, names, options in spec["given"]
    )
    rows.sparse = tuple(_sparse(rest, *one) for one in spec["sparse"])
    rows.expected = tuple(_expected(rest, *one) for one in spec["expected"])
    autocast = None if spec["autocast"] is None else getattr(torch, spec["autocast"])
    more = {"vocab_map": vocab_map, "student_topk": spec["student_topk"], "autocast": autocast}
    return Chunks(rows, student, teachers, impl=impl, dim=spec["dim"], **more), spec


def _filled(kind: type, tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
    return tensors[""] if kind is Tensor else kind(**tensors, **options)


def _sparse(rest: Iterator[Tensor], tail: str, weight: float | None) -> SparseTeacher:
    return SparseTeacher(next(rest), next(rest), tail, next(rest) if weight is None else weight)


def _expected(
    rest: Iterator[Tensor], bias: bool, entropy: bool, checksum: float | None, weight: float | None
) -> ExpectedTeacher:
    mean = next(rest)
    offset, entropies = (next(rest) if given else None for given in (bias, entropy))
    return ExpectedTeacher(mean, offset, entropies, next(rest) if weight is None else weight, checksum)


def _dtype(spec: dict[str, Any]) -> torch.dtype:
    return torch.float64 if spec["wide"] else torch.float32


def _three(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Results of an operator: one that is not wanted is empty."""
    found = [like.new_empty(0) if gradient is None else gradient for gradient in gradients]
    return found + [like.new_empty(0) for _ in range(MOST - len(found))]


@torch.library.impl(LIBRARY, "chunked_forward", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    chunks, spec = _chunks(arguments)
    with without_autocast(chunks.device):
        loss, state = chunks.forward(spec["wanted"], _dtype(spec))
    gradients = chunks.release() if chunks.rows.reduce else []
    return loss, state, chunks.outside(), *_three(gradients, loss)


@torch.library.impl(LIBRARY, "chunked_backward", "CompositeExplicitAutograd")
def _backward(grad_loss: Tensor, state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    chunks, spec = _chunks(arguments)
    with without_autocast(chunks.device):
        chunks.again(spec["wanted"], state, grad_loss)
    return tuple(_three(chunks.release(), grad_loss))


def _shapes(chunks: Chunks, spec: dict[str, Any], like: Tensor) -> list[Tensor]:
    """Of the gradients."""
    shapes = chunks.gradient_shapes()
    return _three(
        [
            like.new_empty(shape, dtype=dtype) if want else None
            for (shape, dtype), want in zip(shapes, spec["wanted"], strict=True)
        ],
        like.new_empty(0, dtype=_dtype(spec)),
    )


@torch.library.register_fake("fastkd::chunked_forward", lib=LIBRARY)
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    chunks, spec = _chunks(arguments)
    like = arguments[0].new_empty(0, dtype=torch.float64)
    width = state_columns(chunks.rows, len(chunks.teachers), chunks.student_topk, chunks.vocab_map is not None)
    loss = like.new_empty(() if chunks.rows.reduce else (chunks.count,), dtype=_dtype(spec))
    gradients = _shapes(chunks, spec, like) if chunks.rows.reduce else _three([], loss)
    return loss, like.new_empty((chunks.count, width)), like.new_empty(()), *gradients


@torch.library.register_fake("fastkd::chunked_backward", lib=LIBRARY)
def _fake_backward(grad_loss: Tensor, state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    chunks, spec = _chunks(arguments)
    return tuple(_shapes(chunks, spec, grad_loss))


@torch.library.impl(LIBRARY, "chunked_scale", "CompositeExplicitAutograd")
def _scale(gradient: Tensor, grad_loss: Tensor, outside: Tensor, source: Tensor) -> Tensor:
    """``source``, whose gradient it is, makes autograd ask for the derivative of this, and be refused."""
    return gradient * (grad_loss * outside).to(gradient.dtype)


@torch.library.register_fake("fastkd::chunked_scale", lib=LIBRARY)
def _fake_scale(gradient: Tensor, grad_loss: Tensor, outside: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(gradient)


class _Saved:
    """Where the tensors among an operator's arguments were."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        leaves, self.structure = torch.utils._pytree.tree_flatten(list(arguments))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return torch.utils._pytree.tree_unflatten(leaves, self.structure)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, state, outside, *gradients = output
    *_, tensors, _, text = inputs
    ctx.spec, ctx.count = ast.literal_eval(text), len(tensors)
    ctx.nothing = [nothing(value) for value in inputs[:-3]]
    student = tensors[: len(ctx.spec["wanted"])]
    ctx.student = [(x.shape, x.dtype) for x in student]
    ctx.reduce = output[0].ndim == 0
    ctx.mark_non_differentiable(state, outside, *gradients)
    ctx.set_materialize_grads(False)
    if ctx.reduce:
        ctx.save_for_backward(outside, *gradients, *student)
    else:
        saved = _Saved(inputs)
        ctx.save_for_backward(state, *saved.tensors)
        saved.tensors = []
        ctx.saved = saved


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    wanted = ctx.spec["wanted"]
    found: list[Tensor | None] = [None] * ctx.count
    if grad_loss is not None:
        if ctx.reduce:
            outside, *saved = ctx.saved_tensors
            pairs = zip(saved[:MOST], saved[MOST:], strict=False)
            gradients = [torch.ops.fastkd.chunked_scale(x, grad_loss, outside, source) for x, source in pairs]
        else:
            state, *tensors = ctx.saved_tensors
            arguments = ctx.saved.arguments(tensors)
            gradients = torch.ops.fastkd.chunked_backward(grad_loss, state, *arguments)
        stored = ctx.spec["given"][0][0] == "Tensor"
        for i, want in enumerate(wanted):
            shape, dtype = ctx.student[i]
            if want:
                gradient = gradients[i].to(dtype)
                found[i] = unflatten(gradient, shape, ctx.spec["dim"]) if stored else gradient.view(shape)
    return (*ctx.nothing, found, None, None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


torch.library.register_autograd("fastkd::chunked_forward", _gradient, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastkd::chunked_scale", _no_second_derivative, lib=LIBRARY)
torch.library.register_autograd("fastkd::chunked_backward", _no_second_derivative, lib=LIBRARY)
