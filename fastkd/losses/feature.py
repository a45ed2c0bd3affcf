"""Distillation of a model's inner features, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .._autocast import without_autocast
from .._features import Features
from . import _feature_arguments
from ._feature_arguments import REDUCTIONS
from ._feature_autograd import loss_of

DISTANCES = ("mse", "l1", "huber", "cosine")
CONVENTIONS = ("code", "paper")
POOLS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def hint_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    distance: str = "mse",
    mask: Tensor | None = None,
    delta: float = 1.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Match features themselves. Same value as, for the distances of elements::

        F.mse_loss(student, teacher)  # "mse"; F.l1_loss for "l1", F.huber_loss(..., delta=delta) for "huber"

    and for ``"cosine"``, of rows along the last dimension::

        (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()

    where a row no longer than 1e-12 counts as zero: distance 1, gradient 0. If the widths differ, put a
    :class:`fastkd.Adapter` behind the student.

    Args:
        student: Features of any shape; float16, bfloat16, float32 or float64. Gets a gradient of its dtype. Maps
            ``(N, C, H, W)`` are passed to ``"cosine"`` with the channels last, ``maps.movedim(1, -1)``.
        teacher: Features of the same shape and device, any of these dtypes. Or what :func:`fastkd.prepare_teacher`
            makes of them. A constant: it never gets a gradient.
        distance: ``"mse"``, ``"l1"``, ``"huber"`` or ``"cosine"``.
        mask: bool, of a shape that broadcasts to the student's, such as ``(N, T, 1)`` for tokens ``(N, T, D)``; True
            where an element counts. What does not may hold anything, NaN too, and gets gradient 0. For ``"cosine"`` its
            last dimension has size 1: a row counts or does not.
        delta: Where the square of ``"huber"`` ends.
        reduction: ``"mean"`` over the elements (rows, for ``"cosine"``) that count, or ``"sum"``.
        impl: Pin an implementation; :func:`fastkd.explain` lists them.

    Returns:
        The loss, 0-dim: float32, or float64 if any features are. Nothing that counts: 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Source: Romero et al. 2015, arXiv 1412.6550.

    Example:
        >>> hint_loss(torch.zeros(2, 3), torch.ones(2, 3), mask=torch.tensor([[True], [False]]))
        tensor(1.)
    """
    student, taught = _feature_arguments.features("hint_loss", student, teacher)
    if student.shape != taught.tensor.shape:
        rule = f"have the student's shape, {tuple(student.shape)}"
        _checks.bad_value("hint_loss", "teacher", rule, tuple(taught.tensor.shape))
    _checks.choice("hint_loss", "distance", distance, DISTANCES)
    if distance == "cosine" and student.ndim == 0:
        _checks.bad_value("hint_loss", "student", 'have a dimension for distance="cosine"', "a 0-dim tensor")
    delta = _checks.number("hint_loss", "delta", delta)
    if not _checks.TINY <= delta <= _checks.HUGE:
        _checks.bad_value("hint_loss", "delta", "be positive and finite in float32", delta)
    _checks.choice("hint_loss", "reduction", reduction, REDUCTIONS)
    if mask is not None:
        _check_mask(mask, student, by_row=distance == "cosine")
    return loss_of("hint_loss", impl, student, taught, distance=distance, delta=delta, reduction=reduction, mask=mask)


def _check_mask(mask: Any, student: Tensor, by_row: bool) -> None:
    if not isinstance(mask, Tensor):
        _checks.bad_type("hint_loss", "mask", "be a bool tensor", type(mask).__name__)
    if mask.dtype is not torch.bool:
        _checks.bad_type("hint_loss", "mask", "be a bool tensor", mask.dtype)
    _checks.same_device("hint_loss", "mask", mask, student)
    missing = student.ndim - mask.ndim
    if missing < 0 or any(m not in (1, n) for m, n in zip(mask.shape, student.shape[missing:], strict=True)):
        rule = f"broadcast to the student's shape, {tuple(student.shape)}"
        _checks.bad_value("hint_loss", "mask", rule, tuple(mask.shape))
    if by_row and mask.ndim and mask.shape[-1] != 1:
        _checks.bad_value(
            "hint_loss", "mask", 'have a last dimension of size 1 for distance="cosine"', tuple(mask.shape)
        )


def attention_transfer_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    convention: str = "code",
    p: float = 2.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Match where in a map the channels are active. Same value, for maps of one size, as::

        s, t = (F.normalize(x.abs().pow(p).mean(1).flatten(1)) for x in (student, teacher))
        (s - t).square().mean()  # "code"
        (s - t).norm(dim=1).mean()  # "paper"

    One read of each side, without a copy of the powers. A map no longer than 1e-12 counts as zero, with gradient 0.

    Args:
        student: Maps ``(N, C, *positions)`` with one to three dimensions of positions; float16, bfloat16, float32 or
            float64. Gets a gradient of its dtype.
        teacher: Maps of the same samples on the same device; the number of channels may differ, and the positions, of
            which the larger number is then averaged down to the smaller (``F.adaptive_avg_pool2d``) in each dimension.
            Or what :func:`fastkd.prepare_teacher` makes of them. A constant: it never gets a gradient.
        convention: ``"code"``, the authors' published code, or ``"paper"``, the formula of the paper.
        p: The power of the activations, at least 1.
        reduction: ``"mean"`` over samples and, for ``"code"``, positions, or ``"sum"``.
        impl: Pin an implementation; :func:`fastkd.explain` lists them.

    Returns:
        The loss, 0-dim: float32, or float64 if any features are. No samples: 0. The sums of powers have to stay within
        the dtype of the loss; it is NaN where they do not.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Source: Zagoruyko and Komodakis 2017, arXiv 1612.03928.

    Example:
        >>> attention_transfer_loss(torch.ones(1, 8, 2, 2), torch.eye(2).expand(1, 4, 2, 2))
        tensor(0.1464)
    """
    student, taught = _maps("attention_transfer_loss", student, teacher)
    _checks.choice("attention_transfer_loss", "convention", convention, CONVENTIONS)
    p = _checks.number("attention_transfer_loss", "p", p)
    if not 1 <= p < math.inf:
        _checks.bad_value("attention_transfer_loss", "p", "be finite and at least 1", p)
    _checks.choice("attention_transfer_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("attention_transfer_loss", impl, student, taught, p=p, convention=convention, reduction=reduction)


def nst_loss(
    student: Tensor, teacher: Tensor | Features, *, reduction: str = "mean", impl: str | None = None
) -> Tensor:
    """Match what the channels of a map respond to (neuron selectivity transfer). Same value, for maps of one size, as::

        def k(a, b):  # every channel with every other: (N, C, C')
            return (a @ b.mT).square()

        s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
        k(s, s).mean() + k(t, t).mean() - 2 * k(s, t).mean()

    through the smaller of the matrices of positions and of channels. A channel no longer than 1e-12 counts as zero,
    with gradient 0.

    Args:
        reduction: ``"mean"`` over the samples, or ``"sum"``.
        student, teacher, impl: As in :func:`attention_transfer_loss`, as are the result and the errors.

    Source: Huang and Wang 2017, arXiv 1707.01219 (the polynomial kernel).

    Example:
        >>> nst_loss(torch.ones(1, 8, 2, 2), torch.eye(2).expand(1, 4, 2, 2))
        tensor(1.0000)
    """
    student, taught = _maps("nst_loss", student, teacher)
    _checks.choice("nst_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("nst_loss", impl, student, taught, reduction=reduction)


def _maps(op: str, student: Any, teacher: Any) -> tuple[Tensor, Features]:
    """Both with the same positions."""
    student, taught = _feature_arguments.features(op, student, teacher)
    for argument, tensor in (("student", student), ("teacher", taught.tensor)):
        if not 3 <= tensor.ndim <= 5:
            _checks.bad_value(op, argument, "have the shape (N, C, positions...)", tuple(tensor.shape))
    if student.ndim != taught.tensor.ndim or student.shape[0] != taught.tensor.shape[0]:
        rule = f"have as many samples and dimensions as the student, {tuple(student.shape)}"
        _checks.bad_value(op, "teacher", rule, tuple(taught.tensor.shape))
    positions = [min(sizes) for sizes in zip(student.shape[2:], taught.tensor.shape[2:], strict=True)]
    student = _pool(student, positions)
    pooled = _pool(taught.tensor, positions)
    return student, taught if pooled is taught.tensor else Features(pooled)


def _pool(maps: Tensor, positions: list[int]) -> Tensor:
    if list(maps.shape[2:]) == positions:
        return maps
    wide = maps if maps.dtype is torch.float64 else maps.float()
    with without_autocast(maps.device):
        pooled: Tensor = POOLS[maps.ndim - 2](wide, positions)
    return pooled
