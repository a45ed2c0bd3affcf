"""Inputs that break distillation losses elsewhere, each by name, for every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logit_problems import DIVERGENCES, STORAGE, evaluate
from torch import Tensor

from fastkd import testing

INF, NAN = float("inf"), float("nan")
N, V = 4, 37


def logits(seed: int) -> Tensor:
    return testing.flat_logits(N, V, seed=seed)


def run(impl: str, student: Tensor, *teachers: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return evaluate(impl, student, *teachers, upstream=torch.ones(len(student)), **options)


def exact(student: Tensor, *teachers: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return evaluate(
        "reference", student.double(), *(t.double() for t in teachers), upstream=torch.ones(len(student)), **options
    )


def assert_judged(impl: str, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Within the bar of the float64 reference, infinities included; returns what came out."""
    got = run(impl, student, teacher, **options)
    testing.assert_as_exact_as_fp32(
        got,
        lambda s, t: evaluate("reference", s, t, upstream=torch.ones(len(s)), **options),
        student,
        teacher,
    )
    assert bool(got[1].isfinite().all())
    return got


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_masked_vocabulary(impl: str, divergence: str, dtype: torch.dtype) -> None:
    """Ids at -inf on both sides weigh nothing: as if they had been cut off."""
    student, teacher = logits(1).to(dtype), logits(2).to(dtype)
    masked = torch.arange(V) % 3 == 1
    loss, grad = run(
        impl,
        student.masked_fill(masked, -INF),
        teacher.masked_fill(masked, -INF),
        divergence=divergence,
        temperature=2.0,
    )
    want_loss, want_grad = exact(student[:, ~masked], teacher[:, ~masked], divergence=divergence, temperature=2.0)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad[:, ~masked].double(), want_grad, rtol=4 * eps, atol=2e-6)
    assert bool((grad[:, masked] == 0).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_student_masked_where_the_teacher_is_not(impl: str, divergence: str) -> None:
    student = logits(1)
    student[1:, 5] = -INF
    loss, grad = assert_judged(impl, student, logits(2), divergence=divergence, temperature=2.0)
    infinite = divergence in ("forward_kl", "cross_entropy", "mse")
    assert bool((loss[1:] == INF).all()) == infinite
    assert bool(loss[0].isfinite())
    if divergence != "mse":
        assert float(grad[1:].abs().max()) > 1e-3, "the gradient of the other ids stays"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_masked_where_the_student_is_not(impl: str, divergence: str) -> None:
    teacher = logits(2)
    teacher[1:, 5] = -INF
    loss, grad = assert_judged(impl, logits(1), teacher, divergence=divergence, temperature=2.0)
    infinite = divergence in ("reverse_kl", "mse")
    assert bool((loss[1:] == INF).all()) == infinite
    if infinite:
        assert bool((grad[1:] == 0).all())
        assert float(grad[0].abs().max()) > 1e-3


@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy", "reverse_kl"])
def test_infinite_even_where_the_probability_underflows(impl: str, divergence: str) -> None:
    """Which ids have mass is read off the logits: exp(-300) is 0 in float32, and no probability of 0."""
    present, absent = logits(1), logits(2)
    present[:, 5] = -300.0
    absent[:, 5] = -INF
    student, teacher = (present, absent) if divergence == "reverse_kl" else (absent, present)
    assert bool((run(impl, student, teacher, divergence=divergence)[0] == INF).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_mask_that_fills_the_first_tile(impl: str, divergence: str) -> None:
    """The running maximum starts out without any finite logit, on either side, or on both."""
    wide = 2500 if impl != "triton" or torch.cuda.is_available() else 700
    student, teacher = testing.flat_logits(3, wide, seed=1), testing.flat_logits(3, wide, seed=2)
    student[:, : wide - 100] = -INF
    teacher[:, : wide - 100] = -INF
    loss, _ = assert_judged(impl, student, teacher, divergence=divergence)
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
def test_gaps_of_1e4(impl: str, divergence: str) -> None:
    student, teacher = logits(1), logits(2)
    student[:, 3] += 1e4
    teacher[:, 7] += 1e4
    assert_judged(impl, student, teacher, divergence=divergence)
    assert_judged(impl, student - 1e4, teacher + 2e4, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_equal_to_student(impl: str, divergence: str) -> None:
    student = testing.peaked_logits(N, V, seed=1)
    loss, _ = assert_judged(impl, student, student.clone(), divergence=divergence, temperature=2.0)
    if divergence != "cross_entropy":
        assert float(loss.abs().max()) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_constant_rows(impl: str, divergence: str) -> None:
    assert_judged(impl, torch.full((N, V), 3.0), torch.full((N, V), -2.0), divergence=divergence)
    assert_judged(impl, torch.full((N, V), 3.0), logits(2), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_row_of_one_id(impl: str, divergence: str) -> None:
    loss, grad = run(impl, torch.tensor([[2.0]]), torch.tensor([[-1.0]]), divergence=divergence)
    assert float(loss) == pytest.approx(9.0 if divergence == "mse" else 0.0, abs=1e-7)
    assert float(grad) == pytest.approx(6.0 if divergence == "mse" else 0.0, abs=1e-7)


@pytest.mark.parametrize("poison", ["nan", "inf", "no_finite"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_unusable_row_is_nan_and_harms_no_other(impl: str, divergence: str, side: str, poison: str) -> None:
    student, teacher = logits(1), logits(2)
    clean = run(impl, student, teacher, divergence=divergence, temperature=2.0)
    bad = student if side == "student" else teacher
    if poison == "no_finite":
        bad[2] = -INF
    else:
        bad[2, 11] = float(poison)
    loss, grad = run(impl, student, teacher, divergence=divergence, temperature=2.0)
    others = torch.tensor([0, 1, 3])
    assert bool(loss[2].isnan())
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_unusable_row_of_the_hard_term(impl: str, poison: float) -> None:
    student = logits(1)
    target = torch.arange(N)
    clean = run(impl, student, logits(2), target=target, alpha=1.0)
    student[2] = poison
    loss, grad = run(impl, student, logits(2), target=target, alpha=1.0)
    others = torch.tensor([0, 1, 3])
    assert bool(loss[2].isnan())
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_0_silences_whatever_it_multiplies(impl: str, divergence: str) -> None:
    """A dropped row, a row of weight 0, a term of weight 0 and a teacher of weight 0 may hold NaN."""
    student, teacher = logits(1), logits(2)
    nan = torch.full_like(teacher, NAN)
    target = torch.arange(N)

    bad_student, bad_teacher = student.clone(), teacher.clone()
    bad_student[1], bad_teacher[1] = NAN, INF
    dropped = target.clone()
    dropped[1] = -100
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    for options in ({"target": dropped}, {"target": target, "row_weight": weight}):
        loss, grad = run(impl, bad_student, bad_teacher, divergence=divergence, **options)
        want_loss, want_grad = run(impl, student, teacher, divergence=divergence, target=target)
        assert float(loss[1]) == 0
        assert bool((grad[1] == 0).all())
        others = torch.tensor([0, 2, 3])
        assert torch.equal(loss[others], want_loss[others])
        assert torch.equal(grad[others], want_grad[others])

    got = run(impl, student, nan, divergence=divergence, target=target, alpha=1.0)
    want = run(impl, student, teacher, divergence=divergence, target=target, alpha=1.0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])

    got = run(impl, student, teacher, nan, divergence=divergence, teacher_weight=(1.0, 0.0))
    want = run(impl, student, teacher, divergence=divergence)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_alpha_0_silences_an_infinite_hard_term(impl: str) -> None:
    student = logits(1)
    student[:, 4] = -INF
    target = torch.full((N,), 4)
    loss, grad = run(impl, student, student.clone(), target=target, alpha=0.0)
    assert float(loss.abs().max()) < 1e-6
    assert bool(grad.isfinite().all())


def test_label_at_minus_infinity(impl: str) -> None:
    student = logits(1)
    student[:, 4] = -INF
    loss, grad = run(impl, student, logits(2), target=torch.full((N,), 4), alpha=1.0)
    assert bool((loss == INF).all())
    want = torch.softmax(student, -1)
    want[:, 4] = -1
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


def test_smoothing_over_a_masked_vocabulary_is_infinite(impl: str) -> None:
    student = logits(1)
    student[:, 4] = -INF
    loss, grad = run(impl, student, logits(2), target=torch.zeros(N, dtype=torch.long), alpha=1.0, label_smoothing=0.1)
    assert bool((loss == INF).all())
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_at_its_limits(impl: str, divergence: str) -> None:
    """The largest float16 logits, and gradients that only a sum shows."""
    student = torch.tensor([[6e4, -6e4, 0.0], [6e4, 6e4, 6e4]], dtype=torch.float16)
    teacher = torch.tensor([[-6e4, 6e4, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float16)
    loss, _ = run(impl, student, teacher, divergence=divergence)
    want, _ = exact(student, teacher, divergence=divergence)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_row(impl: str, divergence: str) -> None:
    loss, grad = run(impl, torch.empty(0, V), torch.empty(0, V), divergence=divergence)
    assert loss.shape == (0,)
    assert grad.shape == (0, V)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30, -1e9])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
def test_masks_made_of_the_lowest_float(impl: str, divergence: str, lowest: float) -> None:
    """Masks of finfo.min are common: no overflow on the way, and no mass where both sides have them."""
    student, teacher = logits(1), logits(2)
    student[:, :20] = lowest
    teacher[:, :20] = lowest
    loss, grad = run(impl, student, teacher, divergence=divergence, temperature=0.5)
    want_loss, want_grad = exact(student[:, 20:], teacher[:, 20:], divergence=divergence, temperature=0.5)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, 20:].double(), want_grad, rtol=1e-5, atol=1e-6)
    assert bool((grad[:, :20] == 0).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_bounded_everywhere(impl: str, divergence: str) -> None:
    """Near-equal, opposite and far: |gradient| stays within T times the largest gap."""
    student = torch.cat([torch.zeros(1, V), logits(1), 50 * logits(2), 1e3 * logits(3)])
    teacher = torch.cat([torch.zeros(1, V) + 1e-6, -logits(1), -50 * logits(2), logits(3)])
    loss, grad = run(impl, student, teacher, divergence=divergence)
    gap = (student - teacher).abs().amax(-1, keepdim=True)
    assert bool(loss.isfinite().all())
    assert bool((loss >= -1e-6).all())
    assert bool((grad.abs() <= 2 * gap + 2).all())
