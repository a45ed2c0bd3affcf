"""Batches of features that can fail, and one judge for every implementation of a loss on features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.testing import assert_as_exact_as_fp32

N, D, D_TEACHER = 13, 7, 5


def flat(n: int = N, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _pair(student: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    return student, flat(len(student), D_TEACHER, seed)


def _duplicates() -> tuple[Tensor, Tensor]:
    student, teacher = _pair(flat())
    student[3], student[7], teacher[4] = student[0], student[0], teacher[9]
    return student, teacher


def _zero_rows() -> tuple[Tensor, Tensor]:
    student, teacher = _pair(flat())
    student[2], student[5], teacher[2], teacher[8] = 0, 0, 0, 0
    return student, teacher


def _equal() -> tuple[Tensor, Tensor]:
    return flat(), flat()


# name -> student and teacher
ADVERSARIAL: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "duplicates": _duplicates,
    "collapsed": lambda: _pair(1 + 1e-6 * flat()),
    "all equal": lambda: _pair(torch.ones(N, D)),
    "zero rows": _zero_rows,
    "all zero": lambda: _pair(torch.zeros(N, D)),
    "offset": lambda: _pair(100 + 1e-3 * flat()),
    "one row": lambda: _pair(flat(1)),
    "two rows": lambda: _pair(flat(2)),
    "no rows": lambda: _pair(flat(0)),
    "teacher equal to student": _equal,
    "teacher constant": lambda: (flat(), torch.ones(N, D_TEACHER)),
    "huge": lambda: _pair(1e4 * flat()),
    "tiny": lambda: _pair(1e-4 * flat()),
    "wider than rows": lambda: _pair(flat(5, 40)),
    "one column": lambda: _pair(flat(N, 1)),
}


def call(loss: Callable[..., Tensor], student: Tensor, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a leaf with the student's values and layout."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher, **options)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def judge(
    loss: Callable[..., Tensor],
    naive: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    **options: Any,
) -> None:
    """Value and gradient against the naive formula in float64, by the bar of ``fastkd.testing``."""

    def formula(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        leaf = s.detach().requires_grad_()
        value = naive(leaf, t)
        (grad,) = torch.autograd.grad(value, leaf)
        return value.detach().reshape(1), grad

    value, grad = call(loss, student, teacher, **options)
    assert grad.dtype is student.dtype
    assert_as_exact_as_fp32((value.reshape(1), grad), formula, student, teacher)
