"""Addresses of the squared distances of a batch on a GPU, for the CUDA kernels (csrc/cuda/pairs.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _pairs
from .._features import Features, Result
from . import extension

_C = extension()
SLAB_BYTES = 64 << 20


def rkd_distance_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    pairs = partial(distances, gradient=gradient)
    return _pairs.loss_of(squares, pairs, pull, student, teacher, gradient, power=2, **options)


def rkd_angle_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    pairs = partial(angles, gradient=gradient)
    return _pairs.loss_of(squares, pairs, pull, student, teacher, gradient, power=3, **options)


def squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    x, other = _centred(x, y)
    out = x.new_empty(len(x), len(other))
    if out.numel() > 0:
        products, lengths = x @ other.T, x.square().sum(1)
        of_other = lengths if y is None else other.square().sum(1)
        rows = (x.data_ptr(), lengths.data_ptr(), len(x))
        others = (other.data_ptr(), of_other.data_ptr(), len(other))
        with _on(x.device) as stream:
            _C.cuda_squared_distances(products.data_ptr(), rows, others, x.shape[1], y is None, out.data_ptr(), stream)
    return out


def pull(slopes: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    other = x if y is None else y
    out = torch.empty_like(x)
    if out.numel() > 0:
        n, width = x.shape
        with _on(x.device) as stream:
            _C.cuda_pull(
                slopes.data_ptr(), x.data_ptr(), n, other.data_ptr(), len(other), width, out.data_ptr(), stream
            )
    return out


def distances(student: Tensor, teacher: Tensor, delta: float, gradient: bool = True) -> tuple[Tensor, Tensor]:
    return _sum(_C.cuda_distance_loss, _C.cuda_distance_loss_scratch, student, teacher, delta, gradient)


def angles(student: Tensor, teacher: Tensor, delta: float, gradient: bool = True) -> tuple[Tensor, Tensor]:
    def scratch_bytes(n: int) -> int:
        return int(_C.cuda_angle_loss_scratch(n, gradient, SLAB_BYTES))

    return _sum(_C.cuda_angle_loss, scratch_bytes, student, teacher, delta, gradient, SLAB_BYTES)


def _sum(
    loss: Callable[..., None],
    scratch_bytes: Callable[[int], int],
    student: Tensor,
    teacher: Tensor,
    delta: float,
    gradient: bool,
    *more: int,
) -> tuple[Tensor, Tensor]:
    """The slopes are empty if nobody wants them."""
    n = len(student)
    slopes = student.new_empty((n, n) if gradient else (0, 0))
    if n == 0:
        return student.new_zeros(()), slopes
    student, teacher = student.contiguous(), teacher.contiguous()
    total, sums = student.new_empty(()), (student.sum(), teacher.sum())
    scratch = torch.empty(scratch_bytes(n), dtype=torch.uint8, device=student.device)
    where = tuple(x.data_ptr() for x in (student, teacher, *sums))
    numbers = (n, _pairs.COINCIDENT, delta, total.data_ptr(), slopes.data_ptr(), *more, scratch.data_ptr())
    with _on(student.device) as stream:
        loss(where, *numbers, stream)
    return total, slopes


def _centred(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    centre = x.mean(0) if y is None else (x.mean(0) + y.mean(0)) / 2
    centre = torch.where(centre.isfinite(), centre, 0)  # a row that is not finite says nothing about the others
    x = x - centre
    return x, x if y is None else y - centre


@contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """The stream that torch's own kernels go to. A launch goes to the current device, whatever its stream is."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
