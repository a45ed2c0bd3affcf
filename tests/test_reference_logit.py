"""The reference itself: gradients against finite differences, values against the code that people write."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from logit_problems import DIVERGENCES, OPTIONS, Problem, answer, has, reference
from torch import Tensor

import fastkd


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, option: str) -> None:
    if not has(divergence, option):
        pytest.skip("takes no such option")
    problem = Problem(divergence, logits="flat", rows=3, vocabulary=11, option=option)
    student, *teachers = (x.double() for x in problem.tensors())
    options = problem.options()

    def loss(student: Tensor) -> Tensor:
        return fastkd.kd_loss(student, teachers, reduction="none", impl="reference", **options)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


def eager(divergence: str, s: Tensor, t: Tensor, beta: float) -> Tensor:
    """What people write, one row: probability space, torch's own functions."""
    lq, lp = F.log_softmax(s, -1), F.log_softmax(t, -1)
    q, p = lq.exp(), lp.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a, reduction="sum")

    return {
        "forward_kl": lambda: F.kl_div(lq, lp, log_target=True, reduction="sum"),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q),
        "skew_kl": lambda: kl(p, beta * p + (1 - beta) * q),
        "skew_reverse_kl": lambda: kl(q, beta * q + (1 - beta) * p),
        "tvd": lambda: (p - q).abs().sum() / 2,
        "cross_entropy": lambda: F.cross_entropy(s[None], p[None]),
    }[divergence]()


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
def test_equals_the_code_people_write(divergence: str) -> None:
    """Value and gradient, with temperature, T^2, labels, smoothing and alpha, by autograd through torch's functions."""
    student = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    teacher, target, t = torch.randn(5, 13, dtype=torch.float64), torch.randint(13, (5,)), 1.7
    beta = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}.get(divergence, 0.0)
    soft = torch.stack([eager(divergence, s / t, p / t, beta) for s, p in zip(student, teacher, strict=True)]).mean()
    hard = F.cross_entropy(student, target, label_smoothing=0.1)
    want = 0.3 * hard + 0.7 * t**2 * soft
    got = fastkd.kd_loss(
        student, teacher, target, divergence=divergence, temperature=t, alpha=0.3, label_smoothing=0.1, impl="reference"
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (want_grad,) = torch.autograd.grad(want, student)
    (got_grad,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-11, atol=1e-13)


def test_mse_is_the_mean_of_squares_of_raw_logits() -> None:
    student, teacher = torch.randn(5, 13), torch.randn(5, 13)
    got = fastkd.kd_loss(student, teacher, divergence="mse", temperature=3.0, impl="reference")
    torch.testing.assert_close(got, F.mse_loss(student, teacher))


def test_z_loss_is_the_squared_logsumexp() -> None:
    student, target = torch.randn(5, 13, dtype=torch.float64), torch.randint(13, (5,))
    want = F.cross_entropy(student, target) + 0.01 * student.logsumexp(-1).square().mean()
    torch.testing.assert_close(fastkd.cross_entropy(student, target, z_loss=0.01, impl="reference"), want)


def test_shared_vocab_is_slicing() -> None:
    student, teacher, target = torch.randn(5, 13), torch.randn(5, 17), torch.randint(13, (5,))
    _, parts = fastkd.kd_loss(student, teacher, target, shared_vocab=11, return_parts=True, impl="reference")
    torch.testing.assert_close(parts.soft, fastkd.kd_loss(student[:, :11], teacher[:, :11], impl="reference"))
    torch.testing.assert_close(parts.hard, F.cross_entropy(student, target))


@pytest.mark.parametrize("logits", ["peaked", "flat"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_reference_is_good_enough_to_set_the_bar(divergence: str, logits: str) -> None:
    """Off by less than 2^-16 of the row's scale: a poor reference must not buy a loose bar."""
    problem = Problem(divergence, logits=logits, rows=8, vocabulary=1009, option="smoothing")
    exact, error, _ = answer(problem)
    for value, bound in zip(exact, error, strict=True):
        scale = value.reshape(len(value), -1).abs().amax(-1)
        assert bool((bound <= 2**-16 * scale).all()), (bound / scale).max()


def test_skew_at_beta_0_is_the_plain_divergence() -> None:
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    for skew, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        got = fastkd.kd_loss(student, teacher, divergence=skew, beta=0.0, impl="reference")
        assert torch.equal(got, fastkd.kd_loss(student, teacher, divergence=plain, impl="reference"))


def test_two_equal_teachers_are_one() -> None:
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    got = fastkd.kd_loss(student, [teacher, teacher], impl="reference")
    torch.testing.assert_close(got, fastkd.kd_loss(student, teacher, impl="reference"))


def test_reference_follows_the_problem_seed() -> None:
    """The cache of answers is sound: a problem gives the same tensors each time."""
    problem = Problem("jsd")
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), problem.tensors(), strict=True))
    assert reference(problem)(*problem.tensors())[0].shape == (problem.rows,)
