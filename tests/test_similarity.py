"""Probabilistic knowledge transfer and correlation congruence: every implementation against the formulas in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feature_problems import ADVERSARIAL, call, flat, judge
from test_rkd_autograd import Largest
from torch import Tensor

import fastkd
from fastkd import correlation_congruence_loss, pkt_loss

Loss = Callable[..., Tensor]
IMPLEMENTATIONS = ("reference", "algebra", "native")


def unit(x: Tensor) -> Tensor:
    short = x.norm(dim=-1, keepdim=True) < 1e-12
    return F.normalize(x.masked_fill(short, 1), dim=-1).masked_fill(short, 0)


def reduce(terms: Tensor, reduction: str) -> Tensor:
    return terms.mean() if reduction == "mean" and terms.numel() else terms.sum()


def naive_pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7, reduction: str = "mean") -> Tensor:
    def probabilities(x: Tensor) -> Tensor:
        x = unit(x)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p, q = probabilities(student), probabilities(teacher)
    return reduce(q * ((q + eps) / (p + eps)).log(), reduction)


def naive_taylor(
    student: Tensor,
    teacher: Tensor,
    gamma: float = 0.4,
    order: int = 2,
    normalize_rows: bool = False,
    reduction: str = "mean",
) -> Tensor:
    def kernel(x: Tensor) -> Tensor:
        x = unit(x) if normalize_rows else x
        powers = [(2 * gamma) ** p * (x @ x.T) ** p / float(math.factorial(p)) for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(powers)

    return reduce((kernel(student) - kernel(teacher)).square(), reduction)


def naive_neighbours(student: Tensor, teacher: Tensor, normalize_rows: bool = False, reduction: str = "mean") -> Tensor:
    s, t = (unit(student), unit(teacher)) if normalize_rows else (student, teacher)
    gap = (s - t).abs()
    return reduce((gap[:-1] * gap[1:]).sum(1), reduction)


neighbours = partial(correlation_congruence_loss, form="neighbours")
LOSSES = {
    "pkt": (pkt_loss, naive_pkt),
    "taylor": (correlation_congruence_loss, naive_taylor),
    "neighbours": (neighbours, naive_neighbours),
}
each_loss = pytest.mark.parametrize(("loss", "naive"), LOSSES.values(), ids=LOSSES)


def pair(loss: Loss, n: int, d: int, d_teacher: int) -> tuple[Tensor, Tensor]:
    return flat(n, d), flat(n, d if loss is neighbours else d_teacher, 1)


@each_loss
@pytest.mark.parametrize("shape", [(13, 7, 5), (5, 40, 3), (6, 2, 30), (2, 3, 4), (1, 3, 3), (0, 3, 3)])
def test_shapes(impl: str, loss: Loss, naive: Loss, shape: tuple[int, int, int]) -> None:
    student, teacher = pair(loss, *shape)
    judge(loss, naive, student, teacher, impl=impl)
    if shape[0] > 1:
        assert call(loss, student, teacher, impl=impl)[1].abs().max() > 1e-3


OPTIONS = [
    (pkt_loss, naive_pkt, {"eps": 0.01}),
    (pkt_loss, naive_pkt, {"reduction": "sum"}),
    (correlation_congruence_loss, naive_taylor, {"order": 1, "gamma": 1.5}),
    (correlation_congruence_loss, naive_taylor, {"order": 5, "reduction": "sum"}),
    (correlation_congruence_loss, naive_taylor, {"normalize_rows": True}),
    (correlation_congruence_loss, naive_taylor, {"normalize_rows": True, "gamma": 2.0, "order": 32}),
    (neighbours, naive_neighbours, {"normalize_rows": True}),
    (neighbours, naive_neighbours, {"reduction": "sum"}),
]


@pytest.mark.parametrize(("loss", "naive", "options"), OPTIONS, ids=[str(case[2]) for case in OPTIONS])
def test_options(impl: str, loss: Loss, naive: Loss, options: dict[str, Any]) -> None:
    student, teacher = pair(loss, 9, 4, 6)
    judge(partial(loss, **options), partial(naive, **options), student, teacher, impl=impl)
    plain, other = (call(loss, student, teacher, impl=impl, **one)[0] for one in ({}, options))
    assert abs(plain - other) > 0.01 * abs(plain)


@each_loss
@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_adversarial(impl: str, loss: Loss, naive: Loss, problem: str) -> None:
    student, teacher = ADVERSARIAL[problem]()
    teacher = teacher[:, : student.shape[1]] if loss is neighbours else teacher
    student = student[:, : teacher.shape[1]] if loss is neighbours else student
    value, grad = call(loss, student, teacher, impl=impl)
    assert value.isfinite()
    assert grad.isfinite().all()
    judge(loss, naive, student, teacher, impl=impl)


def test_numbers_that_are_traced() -> None:
    """With dynamic=True they are symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(correlation_congruence_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for gamma in (0.3, 0.7):
        got = call(compiled, flat(5, 3), flat(5, 3, 1), gamma=gamma)
        torch.testing.assert_close(got, call(correlation_congruence_loss, flat(5, 3), flat(5, 3, 1), gamma=gamma))


@pytest.mark.parametrize("gamma", [1e-38, 300.0, 1e38])
def test_kernels_that_are_nearly_constant(impl: str, gamma: float) -> None:
    """Whatever overflows in the formula on the way."""
    options = {"normalize_rows": True, "gamma": gamma, "order": 32}
    value, grad = call(correlation_congruence_loss, flat(5, 3), flat(5, 3, 1), impl=impl, **options)
    assert 0 <= value < 1e-30
    assert grad.abs().max() < 1e-30


def test_opposite_rows(impl: str) -> None:
    """A probability of 0 on either side."""
    student = torch.tensor([[1.0, 0], [-1, 0], [0.5, 0.1], [0, 1], [-2, 0]])
    teacher = torch.tensor([[1.0, 0], [1, 1], [-1, 0], [-1, -1], [0, 2]])
    judge(pkt_loss, naive_pkt, student, teacher, impl=impl)


@each_loss
def test_dtypes(impl: str, loss: Loss, naive: Loss) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = pair(loss, 9, 5, 6)
        judge(loss, naive, student.to(dtype), teacher.to(dtype), impl=impl)


@each_loss
@pytest.mark.parametrize("by", ["reference", "algebra"])
def test_float64(by: str, loss: Loss, naive: Loss) -> None:
    student, teacher = pair(loss, 6, 3, 4)
    assert loss(student, teacher.double(), impl=by).dtype is torch.float64
    student = student.double().requires_grad_()
    for options in ({}, {} if loss is pkt_loss else {"normalize_rows": True, "reduction": "sum"}):
        assert torch.autograd.gradcheck(partial(loss, teacher=teacher.double(), impl=by, **options), (student,))


@each_loss
def test_strips(loss: Loss, naive: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(loss, 50, 6, 9)
    whole = call(loss, student, teacher)
    monkeypatch.setattr(fastkd._similarity, "ELEMENTS", 350)
    with Largest() as largest:
        strips = call(loss, student, teacher)
    assert largest.numel <= 50 * 9
    torch.testing.assert_close(strips, whole, rtol=1e-6, atol=1e-9)


@each_loss
def test_in_a_program(impl: str, loss: Loss, naive: Loss) -> None:
    torch._dynamo.reset()
    student, teacher = pair(loss, 6, 4, 3)
    taught = fastkd.prepare_teacher(teacher)
    want = call(loss, student, teacher, impl=impl)
    for options in ({}, {} if loss is pkt_loss else {"normalize_rows": True}):
        expected = call(loss, student, teacher, impl=impl, **options)
        assert all(map(torch.equal, call(loss, student, taught, impl=impl, **options), expected))
        compiled = torch.compile(partial(loss, impl=impl, **options), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(call(compiled, student, teacher), expected)
        torch.testing.assert_close(call(compiled, student, taught), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, call(loss, student, teacher, impl=impl), want))
    with torch.inference_mode():
        assert torch.equal(loss(student.clone(), teacher.clone(), impl=impl), want[0])


ARGUMENTS = [
    (pkt_loss, TypeError, "eps must be a number, got str", {"eps": "x"}),
    (pkt_loss, ValueError, "eps must be positive in float32 and at most 1, got 0.0", {"eps": 0}),
    (pkt_loss, ValueError, "reduction must be one of mean, sum, got 'none'", {"reduction": "none"}),
    (correlation_congruence_loss, ValueError, "form must be one of taylor, neighbours, got 'rbf'", {"form": "rbf"}),
    (correlation_congruence_loss, ValueError, "gamma must be positive, got 0.0", {"gamma": 0}),
    (correlation_congruence_loss, ValueError, "gamma must be finite, got inf", {"gamma": math.inf}),
    (correlation_congruence_loss, TypeError, "order must be an integer, got float", {"order": 2.0}),
    (correlation_congruence_loss, ValueError, "order must be positive, got 0", {"order": 0}),
    (correlation_congruence_loss, ValueError, "order must be at most 32, got 33", {"order": 33}),
    (correlation_congruence_loss, TypeError, "normalize_rows must be a bool, got int", {"normalize_rows": 1}),
    (correlation_congruence_loss, ValueError, "reduction must be one of mean, sum, got 0", {"reduction": 0}),
    (
        correlation_congruence_loss,
        ValueError,
        "teacher must have rows as long as the student's, 3, for form='neighbours', got 2",
        {"form": "neighbours"},
    ),
]


@pytest.mark.parametrize(("loss", "error", "message", "options"), ARGUMENTS, ids=[case[2] for case in ARGUMENTS])
def test_arguments(loss: Loss, error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        loss(torch.ones(4, 3), torch.ones(4, 2), **options)
    assert str(raised.value) == f"{loss.__name__}: {message}"


@pytest.mark.native
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 40])
@pytest.mark.parametrize("eps", [1e-7, 1e-30, 0.5])
def test_rows_of_cosines(n: int, eps: float) -> None:
    """In float64, to its last digits: of probabilities that are nearly equal as well."""
    generator = torch.Generator().manual_seed(n)
    cosines = 2 * torch.rand(3, n, generator=generator).double() - 1
    cosines[:, 0] = 1 + 1e-15  # a row's own, as rounding leaves it
    cosines[0, 1:2] = -1
    near = cosines + 1e-3 * torch.rand(3, n, generator=generator).double()
    compare = {by: importlib.import_module(f"fastkd.{by}.similarity")._compare for by in ("algebra", "native")}
    for other in (near, cosines.flip(0), cosines):
        total, slopes = compare["native"](cosines, other, eps, True)
        want, exact = compare["algebra"](cosines.clone(), other.clone(), eps, True)
        torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(slopes, exact, rtol=1e-12, atol=1e-13 / eps)
        assert torch.equal(compare["native"](cosines, other, eps, False)[0], total)
    assert compare["native"](cosines, cosines, eps, False)[0] == 0
