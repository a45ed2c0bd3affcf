"""Addresses and numbers of an int8 table, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import extension
from .logit import CPU, DTYPES, _nowhere

_C = extension()


def forward(input: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = weight.shape
    count = input.shape[0]
    output = torch.empty(count, columns, dtype=dtype, device=CPU)
    wrong = _C.int8_embedding(
        weight.data_ptr() or _nowhere(weight),
        scale.data_ptr() or _nowhere(scale),
        rows,
        columns,
        input.data_ptr() or _nowhere(input),
        count,
        output.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    if wrong < count:
        _checks.bad_value("int8_embedding", "input", f"hold ids from 0 to {rows - 1}", int(input[wrong]))
    return output
