"""Addresses and numbers of an int8 convolution, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._int8 import Window, memory_format
from . import extension
from .int8_linear import layer, refuse
from .int8_packing import packed
from .logit import CPU

_C = extension()


def forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    window: Window,
) -> Tensor:
    batch, _, height, width = input.shape
    count, terms, *kernel = weight.shape
    shape = (count, terms, kernel[0] * kernel[1], window.groups, kernel[1])
    size, form = window.output_size((height, width), (kernel[0], kernel[1])), memory_format(input)
    output = torch.empty((batch, count, *size), dtype=input.dtype, device=CPU, memory_format=form)
    numbers = layer(input, packed(weight, shape), scale, bias, input_scale, residual, output, activation)
    planes = form is torch.contiguous_format and (height, width, *size) != (1, 1, 1, 1)  # where both forms are one
    images = (batch, height, width, planes, *kernel, *window.stride, *window.padding, *window.dilation)
    if not _C.int8_conv2d(shape, numbers + images):
        refuse("int8_conv2d", input_scale)
    return output
