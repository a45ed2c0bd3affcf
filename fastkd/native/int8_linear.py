"""Numbers of an int8 linear layer, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _int8_cuda, extension
from .int8_call import Call, numbers_of_layer
from .int8_packing import packed

_C = extension()


def forward(input: Tensor, *arguments: Any) -> Tensor:
    """With those of :func:`ready`."""
    return _int8_cuda.linear(input, *arguments) if input.is_cuda else ready(input, *arguments)(input)


def ready(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Call:
    rows, terms = input.shape
    count = weight.shape[0]
    shape = (count, terms, 1, 1, 1)
    panels = packed(weight, shape)
    numbers = numbers_of_layer(panels, scale, bias, input_scale, activation, input.dtype)
    numbers += (rows, input.stride(0), count if residual is None else residual.stride(0))
    op, compute = "int8_linear", _C.int8_linear
    return Call(op, compute, shape, numbers, panels, input_scale, residual, (rows, count), input.dtype)
