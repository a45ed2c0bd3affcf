"""Losses over heads against the float64 objective over plain matmuls: values, all gradients, options, storage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_problems import (
    SIDES,
    STUDENT,
    TEACHER,
    HeadProblem,
    check,
    device_of,
    evaluate,
    moved,
    outputs,
    smaller,
    unfused,
)
from logit_problems import DIVERGENCES, OPTIONS, STORAGE, has
from torch import Tensor

import fastkd
from fastkd import Head
from fastkd.testing import assert_as_exact_as_fp32


def take_turns(impl: str, *turns: int) -> None:
    """Without a GPU, what is combined takes turns: interpreted kernels are slow, and others do the same in 16 bits."""
    if not torch.cuda.is_available() and sum(turns) % (9 if impl == "triton" else 3):
        pytest.skip("without a GPU: takes turns")


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_exact(impl: str, divergence: str, option: str, dtype: torch.dtype) -> None:
    if not has(divergence, option):
        pytest.skip("takes no such option")
    take_turns(impl, DIVERGENCES.index(divergence), list(OPTIONS).index(option), STORAGE.index(dtype))
    check(smaller(HeadProblem(divergence, dtype=dtype, option=option), impl), impl)


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_side_may_be_a_head(impl: str, divergence: str, sides: str, dtype: torch.dtype) -> None:
    take_turns(impl, DIVERGENCES.index(divergence), list(SIDES).index(sides), STORAGE.index(dtype))
    check(smaller(HeadProblem(divergence, sides, dtype, "hard"), impl), impl)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_gradient_precision_float32(impl: str, dtype: torch.dtype) -> None:
    """The plain bar holds on a GPU too."""
    check(smaller(HeadProblem("forward_kl", "softcap", dtype, "smoothing"), impl), impl, grad_precision="float32")


MIXTURES = list(itertools.islice(itertools.product(STORAGE, repeat=3), 1, 27, 4))


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
def test_mixed_storage(impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Input, weight and bias of one head, and another head, each of its own dtype."""
    check(smaller(HeadProblem("jsd", option="hard", dtypes=(*dtypes, *dtypes[::-1])), impl), impl)


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("compact", [None, False, True])
@pytest.mark.parametrize("option", ["ignored", "by_row", "shared_vocab"])
def test_compact_or_not(impl: str, option: str, compact: bool | None) -> None:
    check(smaller(HeadProblem("reverse_kl", "softcap_bias_scale", option=option), impl), impl, compact=compact)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 6, 7, 100])
def test_any_number_of_rows_at_a_time(impl: str, chunk: int, compact: bool) -> None:
    if impl == "triton":
        take_turns(impl, chunk, compact)
    problem = smaller(HeadProblem("skew_kl", "softcap", option="ignored"), impl)
    check(problem, impl, compact=compact, workspace=chunk * 3 * 4 * problem.vocabulary)


def test_the_workspace_changes_next_to_nothing(impl: str) -> None:
    """The rows of the loss and of the input's gradient are computed alone; sums over rows are in another order."""
    problem = smaller(HeadProblem("forward_kl", option="hard"), impl)
    one, *rest = [evaluate(problem, impl, problem.tensors(), workspace=size) for size in (1, 2048, 2**20)]
    for other in rest:
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("vocabulary", [2, 300])
def test_shapes(impl: str, rows: int, vocabulary: int) -> None:
    if impl == "triton" and not torch.cuda.is_available() and vocabulary > 100:
        pytest.skip("interpreted: small vocabularies")
    check(HeadProblem("jsd", "both", torch.bfloat16, "temperature_2", rows, vocabulary), impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_is_widened_in_parts(impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.losses import _sources

    monkeypatch.setattr(_sources, "SLAB", 10 * 12 * 4)  # 10 ids of the student's weight
    check(smaller(HeadProblem("forward_kl", option="hard", dtype=dtype), impl), impl)


REDUCTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "batchmean": {"reduction": "batchmean"},
    "normalizer": {"reduction": "sum", "normalizer": 3.5},
    "normalizer_tensor": {"reduction": "mean", "normalizer": torch.tensor(3.5)},
}
DIVISORS = {"sum": 1.0, "mean": 1 + 0.5 + 2, "batchmean": 7.0, "normalizer": 3.5, "normalizer_tensor": 3.5}


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("upstream", [1.0, -0.75])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(impl: str, name: str, upstream: float, dtype: torch.dtype) -> None:
    """Gradients that forward keeps, for an upstream gradient of 1 and any other."""
    take_turns(impl, list(REDUCTIONS).index(name), upstream == 1, STORAGE.index(dtype))
    problem = HeadProblem("forward_kl", dtype=dtype)
    options = {
        "target": torch.tensor([3, -100, 0, 40, -100, 7, 5]),
        "row_weight": torch.tensor([1.0, 5.0, 0.0, 0.5, 1.0, 2.0, 0.0]),
        "temperature": 2.0,
        "alpha": 0.3,
    }
    factor = upstream / DIVISORS[name]

    def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
        student, teacher = problem.split(tuple(x.detach() for x in tensors))
        leaves = [x.requires_grad_() for x in student]
        logits = STUDENT.logits(student), TEACHER.logits(teacher)
        loss = fastkd.kd_loss(*logits, reduction="none", impl="reference", **options)
        grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, factor))
        return outputs(loss / DIVISORS[name], grads)

    device = device_of(impl)
    student, teacher = problem.split(tuple(x.to(device) for x in problem.tensors()))
    leaves = [x.requires_grad_() for x in student]
    keep = {"workspace": 1500, "grad_precision": "float32"}
    heads = STUDENT.given(student, **keep), TEACHER.given(teacher, **keep)
    loss = fastkd.kd_loss(*heads, impl=impl, **moved(device, options | REDUCTIONS[name]))
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    assert_as_exact_as_fp32(outputs(loss, grads), compute, *problem.tensors())


def test_parts(impl: str) -> None:
    problem = smaller(HeadProblem("jsd", "two", option="two_teachers"), impl)
    device = device_of(impl)
    parts = problem.split(tuple(x.to(device) for x in problem.tensors()))
    given = [side.given(own) for side, own in zip(problem.models, parts, strict=True)]
    logits = [side.logits(own) for side, own in zip(problem.models, parts, strict=True)]
    options = moved(device, problem.options()) | {"return_parts": True, "impl": impl}
    for reduction in ("none", "mean", "sum", "batchmean"):
        got, got_parts = fastkd.kd_loss(given[0], given[1:], reduction=reduction, **options)
        want, want_parts = fastkd.kd_loss(logits[0], logits[1:], reduction=reduction, **options)
        torch.testing.assert_close((got, *got_parts), (want, *want_parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_cross_entropy_alone(impl: str, dtype: torch.dtype, reduction: str) -> None:
    """Judged by torch's own."""
    hidden, weight, bias = HeadProblem("forward_kl", dtype=dtype).tensors()[:3]
    target = torch.tensor([3, -100, 0, 40, -100, 7, 5])

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        logits = F.linear(leaves[0], leaves[1], leaves[2]) * 0.7
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
        loss = loss if reduction == "none" else loss / 5
        return outputs(loss, torch.autograd.grad(loss, leaves, torch.ones_like(loss)))

    device = device_of(impl)
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight, bias)]
    head = Head(*leaves, scale=0.7, workspace=1000, grad_precision="float32")
    loss = fastkd.cross_entropy(head, target.to(device), label_smoothing=0.1, reduction=reduction, impl=impl)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert_as_exact_as_fp32(outputs(loss, grads), compute, hidden, weight, bias)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64(divergence: str) -> None:
    """Not rounded to float32 anywhere."""
    problem = HeadProblem(divergence, "softcap_bias_scale", torch.float64, "by_row")
    got, want = evaluate(problem, "reference", problem.tensors()), unfused(problem, *problem.tensors())
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("sides", ["both", "softcap", "softcap_bias_scale"])
def test_gradcheck(sides: str, reduction: str) -> None:
    problem = HeadProblem("jsd", sides, torch.float64, rows=3, vocabulary=7)
    side, other = problem.models
    student, teacher = problem.split(problem.tensors())
    options = {"target": torch.tensor([1, -100, 5]), "z_loss": 0.01, "label_smoothing": 0.1, "temperature": 2.0}

    def loss(*tensors: Tensor) -> Tensor:
        heads = side.given(tensors, workspace=200), other.given(teacher)
        return fastkd.kd_loss(*heads, reduction=reduction, impl="reference", **options)  # type: ignore[call-overload]

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in student))


def test_leading_dimensions(impl: str) -> None:
    """(B, T, H) hidden states, with per-row arguments of shape (B, T)."""
    device = device_of(impl)
    hidden, weight, taught, matrix = (
        torch.randn(2, 3, 5),
        torch.randn(37, 5),
        torch.randn(2, 3, 4),
        torch.randn(37, 4),
    )
    target = torch.tensor([[3, -100, 5], [1, 0, -100]])
    options = {"row_weight": torch.rand(2, 3), "temperature": torch.rand(2, 3) + 1, "alpha": torch.rand(2, 3)}

    def run(shape: Any, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
        def lay(x: Tensor) -> Tensor:
            return shape(x).to(device, copy=True)

        leaves = lay(hidden).requires_grad_(), weight.to(device, copy=True).requires_grad_()
        rows = {name: lay(value) for name, value in options.items()}
        student, teacher = Head(*leaves, workspace=700), Head(lay(taught), matrix.to(device))
        loss = fastkd.kd_loss(student, teacher, lay(target), reduction=reduction, impl=impl, **rows)
        (loss * torch.arange(1, loss.numel() + 1, device=device).reshape(loss.shape)).sum().backward()
        return loss.detach(), leaves[0].grad, leaves[1].grad  # type: ignore[return-value]

    for reduction in ("none", "sum", "mean"):
        got = run(lambda x: x, reduction)
        want = run(lambda x: x.reshape(6, *x.shape[2:]), reduction)
        assert got[0].shape == ((2, 3) if reduction == "none" else ())
        assert got[1].shape == (2, 3, 5)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    batchmean = run(lambda x: x, "batchmean")
    torch.testing.assert_close(batchmean[0], run(lambda x: x, "sum")[0] / 2)
