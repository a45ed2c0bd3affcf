"""Numbers of an int8 convolution, for the C++ kernels (csrc/cpu/int8_layers.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._int8 import Window, memory_format
from . import extension
from .int8_call import Call, numbers_of_layer
from .int8_packing import packed, transformed

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
    images = (batch, height, width, planes, *kernel, *window.stride, *window.padding, *window.dilation)
    panels, compute = None, _C.int8_winograd
    if _C.int8_winograd_pays(shape, images, torch.get_num_threads()):
        panels = transformed(weight, shape)
    if panels is None:
        panels, compute = packed(weight, shape), _C.int8_conv2d
    numbers = numbers_of_layer(panels, scale, bias, input_scale, activation, input.dtype) + images
    output = (batch, count, *size)
    return Call("int8_conv2d", compute, shape, numbers, panels, input_scale, residual, output, input.dtype, form)
