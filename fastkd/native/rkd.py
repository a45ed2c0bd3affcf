"""Addresses of the squared distances of a batch, for the C++ kernels (csrc/cpu/pairs_matrix.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _pairs
from .._features import Features, Result
from . import extension
from .logit import CPU

_C = extension()


def rkd_distance_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    return _pairs.loss_of(squares, distances, pull, student, teacher, gradient, power=2, **options)


def rkd_angle_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    return _pairs.loss_of(squares, angles, pull, student, teacher, gradient, power=3, **options)


def squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    n, width = x.shape
    m = n if y is None else y.shape[0]
    out = torch.empty(n, m, dtype=torch.float64, device=CPU)
    other = 0 if y is None else y.data_ptr()
    _C.pair_squares(x.data_ptr(), n, other, m, width, torch.get_num_threads(), out.data_ptr())
    return out


def pull(slopes: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    n, width = x.shape
    other = x if y is None else y
    out = torch.empty(n, width, dtype=torch.float64, device=CPU)
    threads = torch.get_num_threads()
    _C.pair_pull(slopes.data_ptr(), x.data_ptr(), n, other.data_ptr(), other.shape[0], width, threads, out.data_ptr())
    return out


def distances(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    return _sum(_C.pair_distance_loss, student, teacher, delta)


def angles(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    return _sum(_C.pair_angle_loss, student, teacher, delta)


def _sum(loss: Callable[..., float], student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    slopes = torch.empty_like(student)
    total = loss(
        student.data_ptr(), teacher.data_ptr(), len(student), delta, torch.get_num_threads(), slopes.data_ptr()
    )
    return torch.tensor(total, dtype=torch.float64, device=CPU), slopes
