"""Rows of an int8 table, each with its scale: ``weight[id] * scale[id]``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._int8 import compute_dtype


def forward(input: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows = len(weight)
    outside = (input < 0) | (input >= rows)
    if input.device.type == "cpu" and bool(outside.any()):
        _checks.bad_value("int8_embedding", "input", f"hold ids from 0 to {rows - 1}", int(input[outside][0]))
    if rows == 0:  # and on another device than the CPU, where nothing may be read
        return torch.full((len(input), weight.shape[1]), torch.nan, dtype=dtype, device=input.device)
    ids = torch.where(outside, 0, input)
    steps = torch.where(outside, torch.nan, scale[ids])
    return (weight[ids].to(compute_dtype(scale.dtype)) * steps.unsqueeze(1)).to(dtype)
