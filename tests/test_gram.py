"""Losses of inner products: every implementation against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from feature_problems import ADVERSARIAL, call, flat, judge
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd

IMPLEMENTATIONS = ("reference", "algebra")
SHAPES = [(13, 7, 5), (5, 40, 3), (6, 2, 30), (1, 3, 3), (0, 3, 3)]


def naive_gram(student: Tensor, teacher: Tensor) -> Tensor:
    difference = student @ student.T - teacher @ teacher.T
    return difference.square().sum() / max(1, len(student)) ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_gram(impl: str, shape: tuple[int, int, int]) -> None:
    n, d, d_teacher = shape
    student, teacher = flat(n, d), flat(n, d_teacher, 1)
    judge(fastkd.gram_loss, naive_gram, student, teacher, impl=impl)
    if n > 1:
        assert call(fastkd.gram_loss, student, teacher, impl=impl)[1].abs().max() > 1e-3


@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_gram_is_finite(impl: str, problem: str) -> None:
    student, teacher = ADVERSARIAL[problem]()
    loss, grad = call(fastkd.gram_loss, student, teacher, impl=impl)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_gradcheck(impl: str) -> None:
    for d in (3, 20):
        student, teacher = flat(8, d).double().requires_grad_(), flat(8, 4, 1).double()
        assert torch.autograd.gradcheck(lambda s, t=teacher: fastkd.gram_loss(s, t, impl=impl), (student,))


class Largest(TorchDispatchMode):
    """The most elements that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_matrix_of_all_pairs_where_rows_are_short() -> None:
    student, teacher = flat(200, 6), flat(200, 9, 1)
    with Largest() as largest:
        call(fastkd.gram_loss, student, teacher)
    assert largest.numel == 200 * 9
    with Largest() as largest:
        call(fastkd.gram_loss, student, teacher, impl="reference")
    assert largest.numel == 200**2
