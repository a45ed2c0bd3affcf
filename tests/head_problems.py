"""Problems for losses that compute logits themselves, and their exact answers: the same losses over plain matmuls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from logit_problems import OPTIONS
from torch import Tensor

import fastkd
from fastkd.testing import _check, exact_and_error

Tensors = tuple[Tensor, ...]


class Side(NamedTuple):
    """A model: its hidden size (None for one that hands out logits) and what its head has."""

    hidden: int | None
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    @property
    def count(self) -> int:
        """How many tensors it is made of."""
        return 1 if self.hidden is None else 3 if self.bias else 2

    def logits(self, tensors: Tensors) -> Tensor:
        """In the dtype of the tensors, which all have the same; in plain torch."""
        if self.hidden is None:
            return tensors[0]
        logits = tensors[0] @ tensors[1].t()
        logits = self.scale * (logits + tensors[2] if self.bias else logits)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def given(self, tensors: Tensors, **options: Any) -> Tensor | fastkd.Head:
        if self.hidden is None:
            return tensors[0]
        return fastkd.Head(*tensors, scale=self.scale, softcap=self.softcap, **options)


STUDENT, TEACHER = Side(12, bias=True, scale=0.7), Side(20, bias=True, scale=1.3, softcap=9.0)
SIDES: dict[str, tuple[Side, ...]] = {
    "both": (STUDENT, TEACHER),
    "student": (STUDENT, Side(None)),
    "teacher": (Side(None), TEACHER),
    "softcap": (Side(12, softcap=4.0), Side(12)),
    "softcap_bias_scale": (Side(12, True, 2.0, 5.0), Side(5, False, -0.5)),
    "two": (STUDENT, TEACHER, Side(None)),
    "two_heads": (Side(9), Side(16), TEACHER),
    "logits_two": (Side(None), Side(None), TEACHER),
}


@dataclass(frozen=True)
class HeadProblem:
    """Inputs made from a seed, so that a problem can be the key of a cache."""

    divergence: str
    sides: str = "both"
    dtype: torch.dtype = torch.float32
    option: str = "plain"
    rows: int = 7
    vocabulary: int = 61
    dtypes: tuple[torch.dtype, ...] = ()  # one for each tensor, if they differ

    @property
    def models(self) -> tuple[Side, ...]:
        sides = SIDES[self.sides]
        if self.option.startswith("two_teachers") and len(sides) == 2:
            sides = (*sides, sides[1])
        return sides

    def tensors(self) -> Tensors:
        """The student's, then the teachers'. Rows from nearly flat to peaked."""
        made: list[Tensor] = []
        extra = 7 if self.option == "shared_vocab" else 0
        for k, side in enumerate(self.models):
            generator = torch.Generator().manual_seed(k + 1)
            ids, width = self.vocabulary + (0 if k else extra), side.hidden or 8

            def randn(*shape: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(shape, generator=generator)

            hidden = randn(self.rows, width) * torch.linspace(0.3, 4, self.rows).unsqueeze(1)
            weight, bias = randn(ids, width) * 2 / width**0.5, randn(ids)
            made += [hidden @ weight.t()] if side.hidden is None else [hidden, weight, bias][: side.count]
        dtypes = self.dtypes or (self.dtype,) * len(made)
        return tuple(x.to(dtype) for x, dtype in zip(made, dtypes, strict=True))

    def options(self) -> dict[str, Any]:
        options = {"divergence": self.divergence, **OPTIONS[self.option](self.rows, self.vocabulary)}
        if len(self.models) == 2 or self.option.startswith("two_teachers"):
            return options
        return options | {"teacher_weight": (0.7, 0.4)}

    def upstream(self) -> Tensor:
        """Not 1, and as large as a sum's: a mean's gradients are so small that every bar passes."""
        return torch.linspace(0.5, 1.5, self.rows, dtype=torch.float64)

    def split(self, tensors: Tensors) -> list[Tensors]:
        parts, rest = [], list(tensors)
        for side in self.models:
            parts.append(tuple(rest[: side.count]))
            del rest[: side.count]
        return parts


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def moved(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def evaluate(problem: HeadProblem, impl: str, tensors: Tensors, workspace: int | None = None, **head: Any) -> Tensors:
    """The loss of every row and the gradients of the student's tensors, through heads."""
    device = device_of(impl)
    head["workspace"] = workspace or 3 * 2 * 4 * problem.vocabulary  # about 3 rows: several chunks, the last is shorter
    student, *teachers = problem.split(tuple(x.detach().to(device) for x in tensors))
    leaves = [x.requires_grad_() for x in student]
    models = problem.models
    given = [side.given(own, **head) for side, own in zip(models[1:], teachers, strict=True)]
    loss = fastkd.kd_loss(
        models[0].given(student, **head), given, reduction="none", impl=impl, **moved(device, problem.options())
    )
    grads = torch.autograd.grad(loss, leaves, problem.upstream().to(loss))
    assert [x.dtype for x in grads] == [x.dtype for x in student]
    return outputs(loss, grads)


def unfused(problem: HeadProblem, *tensors: Tensor, round_to: torch.dtype | None = None) -> Tensors:
    """The same with all logits at once. ``round_to``: the gradient of the logits is rounded once on its way."""
    student, *teachers = problem.split(tuple(x.detach() for x in tensors))
    leaves = [x.requires_grad_() for x in student]
    models = problem.models
    logits = models[0].logits(student) if round_to is None else _rounded_on_the_way(models[0], student, round_to)
    taught = [side.logits(own) for side, own in zip(models[1:], teachers, strict=True)]
    loss = fastkd.kd_loss(logits, taught, reduction="none", impl="reference", **problem.options())
    return outputs(loss, torch.autograd.grad(loss, leaves, problem.upstream().to(loss)))


def outputs(loss: Tensor, grads: Sequence[Tensor]) -> Tensors:
    """What the bar judges row by row. The gradients of weight and bias count as one row.

    Theirs are sums over the rows of the logits, whose errors go by the row: an id that has next to no probability in
    any of them has its neighbours' error, not one of its own size.
    """
    of_input, *of_parameters = grads
    return loss.detach().cpu(), of_input.cpu(), *(x.cpu().unsqueeze(0) for x in of_parameters)


def _rounded_on_the_way(side: Side, tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """Past the softcap's slope and the bias, before the scale."""
    product = tensors[0] @ tensors[1].t()
    product.register_hook(lambda grad: (grad / side.scale).to(dtype).to(grad) * side.scale)
    logits = side.scale * (product + tensors[2] if side.bias else product)
    return logits if side.softcap is None else side.softcap * torch.tanh(logits / side.softcap)


@cache
def answer(problem: HeadProblem) -> tuple[Tensors, Tensors]:
    """Exact loss and gradients, and their E."""
    if problem.divergence == "tvd":
        _assert_no_kink(problem)
    return exact_and_error(lambda *tensors: unfused(problem, *tensors), *problem.tensors())


def _assert_no_kink(problem: HeadProblem) -> None:
    """Where p and q are equal any subgradient of tvd is right, and no bar would hold."""
    options = problem.options()
    parts = problem.split(tuple(x.double() for x in problem.tensors()))
    student, *taught = (side.logits(own) for side, own in zip(problem.models, parts, strict=True))
    shared = options.get("shared_vocab", problem.vocabulary)

    def softmax(logits: Tensor, temperature: Any) -> Tensor:
        column = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
        return torch.softmax(logits[:, :shared] / column, -1)

    temperature = options.get("temperature", 1.0)
    own = options.get("teacher_temperature", temperature)
    q = softmax(student, temperature)
    for k, logits in enumerate(taught):
        p = softmax(logits, own[k] if isinstance(own, list) else own)
        assert bool(((p - q).abs() > 1e-5 * (p + q)).all()), "choose another seed"


def allowance(problem: HeadProblem, impl: str, head: dict[str, Any]) -> Sequence[Tensor | float]:
    """On a GPU the gradient of the logits may be rounded once to 16-bit operands: twice what that does to a row."""
    exact, _ = answer(problem)
    models, own = problem.models, problem.tensors()[:2]
    narrow = {x.dtype for x in own} <= {torch.bfloat16} or {x.dtype for x in own} <= {torch.float16}
    if device_of(impl) == "cpu" or models[0].hidden is None or not narrow or head.get("grad_precision") == "float32":
        return [0.0] * len(exact)
    once = unfused(problem, *(x.double() for x in problem.tensors()), round_to=own[0].dtype)
    difference = [(x - y).abs().reshape(len(x), -1).amax(1) for x, y in zip(once, exact, strict=True)]
    return [2 * x.reshape(-1, *[1] * (y.ndim - 1)) for x, y in zip(difference, exact, strict=True)]


def check(problem: HeadProblem, impl: str, **head: Any) -> None:
    exact, error = answer(problem)
    slack = allowance(problem, impl, head)
    got = evaluate(problem, impl, problem.tensors(), **head)
    for i, (one, want, bound) in enumerate(zip(got, exact, error, strict=True)):
        _check(i, one, want, bound, 256.0, slack[i])
        if i:
            assert float(want.abs().max()) > 1e-4, "the expected gradient is next to nothing: the test could not fail"


def smaller(problem: HeadProblem, impl: str) -> HeadProblem:
    """Interpreted kernels are slow."""
    if impl != "triton" or torch.cuda.is_available():
        return problem
    return replace(problem, rows=4, vocabulary=41)
