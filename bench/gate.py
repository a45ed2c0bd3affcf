"""Nothing is timed that has not passed here.

fastkd is held to the bar of :mod:`fastkd.testing`, element by element: as exact as float32 arithmetic allows. Eager
code computes in the dtype of its inputs, so it is only kept from computing something else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.testing import exact_and_error

SLACK = 256
TIE = 1e-5
EAGER_BAR = {torch.float32: 2e-4, torch.float16: 0.01, torch.bfloat16: 0.04}


class Wrong(Exception):
    """A number is not what the mathematics says."""


class Expected(NamedTuple):
    """Of rows taken one by one (``reduction="none"``, upstream gradient 1)."""

    loss: Tensor  # (N,) float64
    loss_error: Tensor  # (N,) what float32 gets wrong
    grad: Tensor  # (N, V) float64
    grad_error: Tensor  # (N, 1)
    forgiven: Tensor  # (N, V) what tvd's kink allows on top


def expected(student: Tensor, teacher: Tensor, target: Tensor | None, **options: Any) -> Expected:
    """By the reference, in float64; ``options`` are those of kd_loss."""

    def reference(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, target, **{**options, "reduction": "none", "impl": "reference"})
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), grad

    student, teacher = student.detach(), teacher.detach()
    (loss, grad), (loss_error, grad_error) = exact_and_error(reference, student, teacher)
    return Expected(loss, loss_error, grad, grad_error.unsqueeze(-1), _forgiven(student, teacher, options))


def check_gradient(who: str, got: Tensor, want: Expected) -> None:
    """``got``: the gradient of the same rows, under an upstream gradient of 1 for each."""
    finfo = torch.finfo(got.dtype)
    bar = finfo.eps * want.grad.abs() + finfo.eps * finfo.tiny + SLACK * want.grad_error + want.forgiven
    if not want.grad.abs().max() > 0:
        raise Wrong(f"{who}: the expected gradient is 0 everywhere, so this check sees nothing")
    within(f"{who}: gradient", got.double(), want.grad, bar)


def check_losses(who: str, got: Tensor, want: Expected) -> None:
    bar = torch.finfo(torch.float32).eps * want.loss.abs() + SLACK * want.loss_error
    within(f"{who}: loss", got.double(), want.loss, bar)


def check_mean(who: str, got: Tensor, exact: Tensor, sample: Expected) -> None:
    """A mean over many rows, a sample of which says how far off float32 is."""
    bar = torch.finfo(torch.float32).eps * exact.abs() + SLACK * sample.loss_error.max()
    within(f"{who}: loss", got.double(), exact, bar)


def check_eager(
    who: str, loss: Tensor, grad: Tensor | None, exact: Tensor, sample: Expected, dtype: torch.dtype
) -> None:
    """The right formula, to what its dtype can hold: relative error of the loss, and of the gradient in the L2 norm."""
    bar = EAGER_BAR[dtype]
    within(f"{who}: loss", loss.double(), exact, bar * exact.abs())
    if grad is not None:
        error = float((grad.double() - sample.grad).norm() / sample.grad.norm())
        if not error <= bar:
            raise Wrong(f"{who}: gradient is off by {error:.1e} of its norm, the bar is {bar:.0e}")


def mean_loss(student: Tensor, teacher: Tensor, target: Tensor, *, elements: int = 2**23, **options: Any) -> Tensor:
    """The exact mean over rows, computed in slices of about ``elements`` logits."""
    rows = max(1, elements // student.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    parts = (x.detach().split(rows) for x in (student, teacher, target))
    for s, t, y in zip(*parts, strict=True):
        total += fastkd.kd_loss(s.double(), t.double(), y, reduction="sum", impl="reference", **options)
    return total / student.shape[0]


def _forgiven(student: Tensor, teacher: Tensor, options: dict[str, Any]) -> Tensor:
    """tvd has a kink at p = q: any subgradient passes there, and moves its row by T q (mass of the ties)."""
    if options.get("divergence") != "tvd":
        return torch.zeros((), dtype=torch.float64, device=student.device)
    temperature = options.get("temperature", 1.0)
    q, p = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
    ties = (p - q).abs() <= TIE * (p + q)
    return temperature * q * (ties + (q * ties).sum(-1, keepdim=True))


def within(what: str, got: Tensor, exact: Tensor, bar: Tensor) -> None:
    error = (got - exact).abs()
    excess = torch.where(got == exact, 0.0, error / bar)  # infinities that agree are no error
    if not bool((excess <= 1).all()):
        worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        value, truth, factor = (float(x.flatten()[worst]) for x in (got, exact, excess))
        raise Wrong(f"{what} is {value:.9g} where {truth:.9g} is exact: {factor:.1f} times the bar")
