"""The published formulas of losses on pairs of rows, written once more, and batches that only such losses can fail."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from feature_problems import ADVERSARIAL as FEATURES
from feature_problems import flat
from torch import Tensor

from fastkd.testing import flat_logits


def close_rows(distance: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """Two rows of the student and two of the teacher so far from one another, among others."""

    def problem() -> tuple[Tensor, Tensor]:
        student, teacher = flat(), flat(13, 5, 1)
        student[3] = student[8] = flat(1, 7, 2)[0].bfloat16()  # so that the sum below is one of float32
        student[8, 2] += distance
        teacher[4] = teacher[8] = flat(1, 5, 3)[0].bfloat16()
        teacher[8, 1] += distance
        return student, teacher

    return problem


def _outlier() -> tuple[Tensor, Tensor]:
    student, teacher = flat(), flat(13, 5, 1)
    student[5] *= 1e4
    return student, teacher


ADVERSARIAL = {
    **FEATURES,
    "outlier": _outlier,
    **{f"rows {distance} apart": close_rows(distance) for distance in (1e-2, 1e-3, 1e-4, 1e-6)},
    "clusters": lambda: (flat_logits(3, 6).repeat(5, 1) + 1e-3 * flat(15, 6), flat(15, 4, 1)),
    "1e15": lambda: (1e15 * flat(), 1e-15 * flat(13, 5, 1)),
}


def differences(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs, with their lengths, and which pairs are coincident."""
    e = x[None, :] - x[:, None]
    d = e.detach().double().norm(dim=-1)
    n = len(x)
    coincident = d <= 1e-6 * (d.square().sum() / max(1, n * (n - 1))).sqrt()
    return e, e.masked_fill(coincident[..., None], 1).norm(dim=-1), coincident


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-12)


def huber(error: Tensor, delta: float, reduction: str) -> Tensor:
    if error.numel() == 0:
        return error.sum()
    return F.huber_loss(error, torch.zeros_like(error), reduction=reduction, delta=delta)


def naive_distance(
    student: Tensor, teacher: Tensor, delta: float = 1.0, normalize_rows: bool = False, reduction: str = "mean"
) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        _, d, coincident = differences(unit(x) if normalize_rows else x)
        d = d.masked_fill(coincident, 0)
        n = len(x)
        return d if coincident.all() else d / (d.sum() / (n * (n - 1)))

    return huber(relative(student) - relative(teacher), delta, reduction)


def naive_angle(
    student: Tensor, teacher: Tensor, delta: float = 1.0, normalize_rows: bool = False, reduction: str = "mean"
) -> Tensor:
    def cosines(x: Tensor) -> Tensor:
        e, d, coincident = differences(unit(x) if normalize_rows else x)
        e = e.masked_fill(coincident[..., None], 0) / d[..., None]
        return e @ e.mT

    return huber(cosines(student) - cosines(teacher), delta, reduction)
