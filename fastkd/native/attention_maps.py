"""Addresses and numbers of maps, for the C++ kernels (csrc/cpu/feature_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result, keep
from . import extension
from .logit import CPU, DTYPES, _nowhere

_C = extension()
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def attention_transfer_loss(
    student: Features, teacher: Features, gradient: bool, *, p: float, convention: str, reduction: str
) -> Result:
    maps = student.tensor
    taught = keep(teacher, f"attention, p={p}, {torch.float32}", lambda: _attention(teacher.tensor, p)).contiguous()
    maps, where = _laid_out(maps)
    samples, positions = taught.shape
    paper = convention == "paper"
    count = 1 if reduction == "sum" else max(1, samples if paper else samples * positions)
    slope = torch.empty_like(maps, dtype=torch.float32) if gradient else None
    address = 0 if slope is None else slope.data_ptr()
    loss = _C.attention_map_loss(
        *where, p, torch.get_num_threads(), taught.data_ptr() or _nowhere(taught), paper, 1 / count, address
    )
    return torch.tensor(loss, dtype=torch.float32, device=CPU), slope


def _attention(x: Tensor, p: float) -> Tensor:
    x, where = _laid_out(x)
    out = torch.empty(x.shape[0], x.shape[2:].numel(), dtype=torch.float32, device=CPU)
    _C.attention_maps(*where, p, torch.get_num_threads(), out.data_ptr() or _nowhere(out))
    return out


def _laid_out(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int, bool]]:
    """Samples one after the other, with their channels first or last, and no sign that is yet to be changed."""
    x = x.resolve_neg()
    last = not x.is_contiguous() and x.ndim in LAST and x.is_contiguous(memory_format=LAST[x.ndim])
    x = x if last else x.contiguous()
    positions = x.shape[2:].numel()
    return x, (x.data_ptr() or _nowhere(x), DTYPES[x.dtype], x.shape[0], x.shape[1], positions, last)
