"""Addresses and numbers of an int8 linear layer, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .._int8 import ACTIVATIONS
from .._int8_arguments import bad_step
from . import _int8_cuda, extension
from .int8_packing import packed
from .logit import CPU, DTYPES, _nowhere

_C = extension()


def forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    if input.is_cuda:
        return _int8_cuda.linear(input, weight, scale, bias, input_scale, residual, activation)
    rows, terms = input.shape
    count = weight.shape[0]
    shape = (count, terms, 1, 1, 1)
    output = torch.empty(rows, count, dtype=input.dtype, device=CPU)
    panels = packed(weight, shape)
    numbers = layer(input, panels, scale, bias, input_scale, residual, output, activation)
    strides = (rows, input.stride(0), count if residual is None else residual.stride(0))
    if not _C.int8_linear(shape, numbers + strides):
        refuse("int8_linear", input_scale)
    return output


def layer(
    input: Tensor,
    panels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    activation: str,
) -> tuple[int, ...]:
    """What the layers have in common; csrc/bindings_int8.cpp takes it apart in this order."""
    return (
        input.data_ptr() or _nowhere(input),
        DTYPES[input.dtype],
        0 if input_scale is None else input_scale.data_ptr() or _nowhere(input_scale),
        panels.data_ptr(),
        scale.data_ptr() or _nowhere(scale),
        0 if bias is None else bias.data_ptr() or _nowhere(bias),
        0 if residual is None else residual.data_ptr() or _nowhere(residual),
        output.data_ptr(),
        ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )


def refuse(op: str, input_scale: Tensor | None) -> NoReturn:
    bad_step(op, None if input_scale is None else input_scale.item())
