"""wsld_weights and wsld_loss: the published formula, its edges, and every implementation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import Head, TopK
from fastkd.testing import assert_as_exact_as_fp32, flat_logits, peaked_logits

INF, NAN = float("inf"), float("nan")
N, V = 5, 43
pytestmark = pytest.mark.few_interpreted(7)
TARGET = torch.tensor([3, 0, 42, 7, 9])


def published(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    own, taught = (F.cross_entropy(x, target, reduction="none") for x in (student, teacher))
    return 1 - torch.exp(-torch.relu(own / (taught + 1e-7)))


def published_loss(student: Tensor, teacher: Tensor, target: Tensor, t: float) -> Tensor:
    soft = F.cross_entropy(student / t, (teacher / t).softmax(-1), reduction="none")
    return t**2 * published(student, teacher, target).detach() * soft


@pytest.mark.parametrize("logits", [flat_logits, peaked_logits])
def test_weights(impl: str, logits: Any) -> None:
    student, teacher = logits(N, V, seed=1), logits(N, V, seed=2)
    got = fastkd.wsld_weights(student.requires_grad_(), teacher, TARGET, impl=impl)
    assert not got.requires_grad
    want = published(student.detach().double(), teacher.double(), TARGET)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss(impl: str, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = flat_logits(N, V, seed=1, dtype=dtype), flat_logits(N, V, seed=2, dtype=dtype)
    leaf = student.clone().requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "reduction": "none", "impl": impl}
    loss = fastkd.wsld_loss(leaf, teacher, TARGET, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones(N))

    def rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = published_loss(leaf, teacher, TARGET, temperature)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    assert_as_exact_as_fp32((loss.detach(), grad), rows, student, teacher)
    assert float(grad.abs().max()) > 1e-3


def test_gradcheck_with_constant_weights() -> None:
    student, teacher = flat_logits(3, 7, seed=1).double().requires_grad_(), flat_logits(3, 7, seed=2).double()
    target = TARGET[:3] % 7
    weight = fastkd.wsld_weights(student, teacher, target)
    want = 4 * (weight * F.cross_entropy(student / 2, (teacher / 2).softmax(-1), reduction="none")).mean()
    got = fastkd.wsld_loss(student, teacher, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_reductions_do_not_divide_by_what_the_weights_are(impl: str, reduction: str) -> None:
    student, teacher = flat_logits(N, V, seed=1), flat_logits(N, V, seed=2)
    target, weight = TARGET.clone(), torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0])
    target[1] = -100
    rows = published_loss(student, teacher, TARGET, 2.0)
    counts = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    divisor = {"sum": 1.0, "mean": 4.0, "batchmean": 5.0}[reduction]
    got = fastkd.wsld_loss(student, teacher, target, reduction=reduction, impl=impl)
    torch.testing.assert_close(got, (rows * counts).sum() / divisor)
    divisor = {"sum": 1.0, "mean": 5.0, "batchmean": 5.0}[reduction]
    got = fastkd.wsld_loss(student, teacher, target, row_weight=weight, reduction=reduction, impl=impl)
    torch.testing.assert_close(got, (rows * counts * weight).sum() / divisor)
    got = fastkd.wsld_loss(student, teacher, target, normalizer=7, reduction=reduction, impl=impl)
    torch.testing.assert_close(got, (rows * counts).sum() / 7)


@pytest.mark.parametrize(
    ("student", "teacher", "want"),
    [
        (0.0, INF, 0.0),  # both certain of it
        (-INF, 0.0, 1.0),  # the student excludes it
        (-INF, -INF, 1.0),  # so does the teacher: nothing is learned yet
        (0.0, -INF, 0.0),  # the teacher excludes it
        (1e4, 1e4, 0.0),
        (-1e4, 0.0, 1.0),
    ],
)
def test_edges_of_the_weights(impl: str, student: float, teacher: float, want: float) -> None:
    """The target's logit; INF stands for a row that is masked but for it."""
    sides = []
    for value in (student, teacher):
        side = torch.zeros(1, V)
        side[0, 3] = value
        if value == INF:
            side = torch.full((1, V), -INF)
            side[0, 3] = 0.0
        sides.append(side)
    if student == 0.0 and teacher == INF:
        sides[0] = sides[1].clone()
    got = fastkd.wsld_weights(*sides, torch.tensor([3]), impl=impl)
    assert float(got) == pytest.approx(want, abs=1e-6)


def test_unusable_and_dropped_rows(impl: str) -> None:
    student, teacher, target = flat_logits(N, V, seed=1), flat_logits(N, V, seed=2), TARGET.clone()
    student[1], teacher[2], target[2], student[3, 5] = NAN, NAN, -100, INF
    got = fastkd.wsld_weights(student, teacher, target, impl=impl)
    assert got.isnan().tolist() == [False, True, False, True, False]
    assert got[2] == 0
    leaf = student.requires_grad_()
    loss = fastkd.wsld_loss(leaf, teacher, target, reduction="none", impl=impl)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    assert loss[2] == 0
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones(N))
    assert bool(grad[[0, 2, 4]].isfinite().all())
    loss = fastkd.wsld_loss(leaf, teacher, torch.full((N,), -100), impl=impl)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == 0
    assert not bool(grad.any())


def test_shapes_heads_and_weights_as_row_weight(impl: str) -> None:
    hidden, matrix, teacher = torch.randn(2, 3, 6, requires_grad=True), torch.randn(V, 6), torch.randn(2, 3, V)
    target = torch.randint(V, (2, 3))
    student = hidden @ matrix.T
    weight = fastkd.wsld_weights(Head(hidden, matrix), teacher, target, impl=impl)
    torch.testing.assert_close(weight, fastkd.wsld_weights(student, teacher, target, impl=impl))
    assert weight.shape == (2, 3)
    got = fastkd.wsld_loss(Head(hidden, matrix), teacher, target, impl=impl)
    want = fastkd.kd_loss(
        student, teacher, divergence="cross_entropy", temperature=2.0, row_weight=weight, normalizer=6, impl=impl
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden))
    maps, taught = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    got = fastkd.wsld_weights(maps, taught, target % 7, dim=1, impl=impl)
    torch.testing.assert_close(
        got, fastkd.wsld_weights(maps.movedim(1, -1), taught.movedim(1, -1), target % 7, impl=impl)
    )


def test_compiled(impl: str) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.wsld_loss(student * 2, teacher, TARGET, impl=impl)

    torch._dynamo.reset()
    leaf, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, teacher), loss(leaf, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(want, leaf))


S, T, Y = torch.zeros(8, 100), torch.zeros(8, 100), torch.zeros(8, dtype=torch.long)
REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "student": (TypeError, "student must be a tensor of logits or a Head, got list", ([1.0], T, Y), {}),
    "teacher": (
        TypeError,
        "teacher must be a tensor of logits or a Head, got TopK",
        (S, TopK(Y[:, None], torch.zeros(8, 1)), Y),
        {},
    ),
    "shape": (ValueError, "teacher must have the student's shape, (8, 100), got (7, 100)", (S, T[:7], Y), {}),
    "target": (TypeError, "target must be a tensor of class ids, got None", (S, T, None), {}),
    "target_id": (ValueError, "target must hold ids from 0 to 99, or ignore_index=-100, got 100", (S, T, Y + 100), {}),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("op", ["wsld_loss", "wsld_weights"])
def test_message(op: str, case: str) -> None:
    error, message, args, options = REFUSED[case]
    with pytest.raises(error, match="^" + re.escape(f"{op}: {message}")):
        getattr(fastkd, op)(*args, **options)
