"""Addresses of the squared distances of a batch, for the C++ kernels (csrc/cpu/pairs_matrix.h)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _pairs
from .._features import Features, Result, keep
from . import _pairs_cuda, extension
from .logit import CPU

_C = extension()

NEAR = 16  # powers of 2: even coincident rows are further apart than the root of the least float32


def rkd_distance_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    """Rows stay float32, at half the price: no cosine magnifies an error of a distance here."""
    if student.tensor.is_cuda:
        return _pairs_cuda.rkd_distance_loss(student, teacher, gradient, **options)
    if options["normalize_rows"] or student.tensor.numel() == 0:
        return _pairs.loss_of(squares, distances, pull, student, teacher, gradient, power=2, **options)
    scaled, scale = _scaled(student.tensor)
    taught = keep(teacher, "squared_distances_of_floats", lambda: squares(_scaled(teacher.tensor)[0].tensor))
    loss, slope = _pairs.loss_of(squares, distances, pull, scaled, teacher, gradient, taught=taught, power=2, **options)
    return loss, slope if slope is None or scale == 1 else slope.div_(scale)


def _scaled(x: Tensor) -> tuple[Features, float]:
    """Rows in float32, whose squares do not leave its range; what they were divided by does not matter to the loss."""
    rows = x.float().resolve_neg()
    scale = _scale(rows)
    return Features((rows if scale == 1 else rows / scale).contiguous()), scale


def _scale(rows: Tensor) -> float:
    """A power of 2 that brings the largest difference near 1; 1 where it is not far from that."""
    high, low = rows.amax(0), rows.amin(0)
    spread, largest = float((high - low).amax()), float(torch.maximum(high.abs(), low.abs()).amax())
    if spread >= 2.0**-NEAR and largest <= 2.0**NEAR:
        return 1.0
    exponent = max(math.frexp(spread)[1], math.frexp(largest)[1] - 100)  # nor do rows that are far from 0
    return math.ldexp(1.0, 127 if math.isinf(spread) else min(max(exponent, -126), 127))


def rkd_angle_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    if student.tensor.is_cuda:
        return _pairs_cuda.rkd_angle_loss(student, teacher, gradient, **options)
    return _pairs.loss_of(squares, angles, pull, student, teacher, gradient, power=3, **options)


def squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Of float32 or float64 rows."""
    if x.is_cuda:
        return _pairs_cuda.squares(x, y)
    n, width = x.shape
    m = n if y is None else y.shape[0]
    out = torch.empty(n, m, dtype=torch.float64, device=CPU)
    other = 0 if y is None else y.data_ptr()
    compute = _C.pair_squares if x.dtype is torch.float64 else _C.pair_squares_narrow
    compute(x.data_ptr(), n, other, m, width, torch.get_num_threads(), out.data_ptr())
    return out


def pull(slopes: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    """In the dtype of the rows."""
    if x.is_cuda:
        return _pairs_cuda.pull(slopes, x, y)
    n, width = x.shape
    other = x if y is None else y
    slopes = slopes.to(x.dtype)
    out = torch.empty(n, width, dtype=x.dtype, device=CPU)
    compute = _C.pair_pull if x.dtype is torch.float64 else _C.pair_pull_narrow
    threads = torch.get_num_threads()
    compute(slopes.data_ptr(), x.data_ptr(), n, other.data_ptr(), other.shape[0], width, threads, out.data_ptr())
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
