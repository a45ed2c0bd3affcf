"""Addresses and numbers of features that are compared in place, for the C++ kernels (csrc/cpu/feature_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result
from . import extension
from .logit import CPU, DTYPES, _nowhere

_C = extension()
DISTANCE = {"mse": 0, "l1": 1, "huber": 2, "cosine": 3}  # Distance in csrc/cpu/feature.h


def hint_loss(
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    distance: str,
    delta: float,
    reduction: str,
    mask: Tensor | None = None,
) -> Result:
    # A permuted layout that both share need not be copied, but a mask would have to be laid out like it.
    s, t = (side.tensor.resolve_neg().contiguous() for side in (student, teacher))
    by_row = distance == "cosine"
    shape, width = (s.shape[:-1], s.shape[-1]) if by_row else (s.shape, 1)
    rows = count = shape.numel()
    if mask is not None:
        mask = (mask.expand(*shape, 1).squeeze(-1) if by_row else mask.expand(shape)).contiguous()
        count = int(mask.sum())
    slope = torch.empty(s.shape, dtype=torch.float32, device=CPU) if gradient else None
    loss = _C.hint_loss(
        s.data_ptr() or _nowhere(s),
        DTYPES[s.dtype],
        t.data_ptr() or _nowhere(t),
        DTYPES[t.dtype],
        rows,
        width,
        0 if mask is None else mask.data_ptr() or _nowhere(mask),
        DISTANCE[distance],
        delta,
        1.0 if reduction == "sum" else 1.0 / max(1, count),
        torch.get_num_threads(),
        0 if slope is None else slope.data_ptr(),
    )
    return torch.tensor(loss, dtype=torch.float32, device=CPU), slope
