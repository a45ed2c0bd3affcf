"""Numbers of a linear layer with int8 weights, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import extension
from .int8_call import Call, numbers_of_layer
from .int8_packing import packed

_C = extension()


def forward(input: Tensor, *arguments: Any) -> Tensor:
    """With those of :func:`ready`."""
    return ready(input, *arguments)(input)


def ready(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Call:
    rows, terms = input.shape
    count = weight.shape[0]
    shape = (count, terms, 1, 1, 1)
    panels = packed(weight, shape)
    numbers = numbers_of_layer(panels, scale, bias, None, activation, input.dtype)
    numbers += (rows, input.stride(0), count if residual is None else residual.stride(0))
    op, compute = "int8_weight_only_linear", _C.int8_weight_only
    return Call(op, compute, shape, numbers, panels, None, residual, (rows, count), input.dtype)
