"""Numbers of an int8 convolution, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._int8 import Window, memory_format
from . import extension
from .int8_call import Call, Layer

_C = extension()


def forward(input: Tensor, *arguments: Any) -> Tensor:
    """With those of :func:`ready`."""
    return ready(input, *arguments)(input)


def ready(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    window: Window,
) -> Call:
    """A residual has the layout of the output."""
    batch, _, height, width = input.shape
    count, terms, *kernel = weight.shape
    apart = window.groups == 1 and window.dilation[1] > 1  # the taps of a line
    shape = (count, terms, kernel[0] * kernel[1], window.groups, 1 if apart else kernel[1])
    size, form = window.output_size((height, width), (kernel[0], kernel[1])), memory_format(input)
    planes = form is torch.contiguous_format and (height, width, *size) != (1, 1, 1, 1)  # where both forms are one
    numbers, panels = Layer(weight, scale, bias, input_scale, activation).numbers(shape, input.dtype)
    numbers += (batch, height, width, planes, *kernel, *window.stride, *window.padding, *window.dilation)
    op, compute, output = "int8_conv2d", _C.int8_conv2d, (batch, count, *size)
    return Call(op, compute, shape, numbers, panels, input_scale, residual, output, input.dtype, form)
