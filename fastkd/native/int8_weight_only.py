"""Addresses and numbers of a linear layer with int8 weights, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .int8_linear import layer
from .int8_packing import packed
from .logit import CPU

_C = extension()


def forward(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    rows, terms = input.shape
    count = weight.shape[0]
    shape = (count, terms, 1, 1, 1)
    output = torch.empty(rows, count, dtype=input.dtype, device=CPU)
    numbers = layer(input, packed(weight, shape), scale, bias, None, residual, output, activation)
    _C.int8_weight_only(shape, (*numbers, rows, input.stride(0), count if residual is None else residual.stride(0)))
    return output
