r"""A convolution in int8: each image is quantised, and the patches that the taps see are the rows of a linear layer.

Padding is the number 0. With s_b the scale of image b, a_bpk what tap k sees at output pixel p, and weights w that
stand for w c_n::

    y_bnp = activation( s_b c_n sum_k a_bpk w_nk + bias_n + residual_bnp )
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._int8 import Window, memory_format
from .int8_linear import exact_products, finish, quantized


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
    batch, count, groups = len(input), len(weight), window.groups
    kernel = (weight.shape[2], weight.shape[3])
    height, width = window.output_size((input.shape[2], input.shape[3]), kernel)
    levels, steps = quantized(input, input_scale, "int8_conv2d")
    patches = F.unfold(levels.float(), kernel, window.dilation, window.padding, window.stride)
    terms = math.prod(weight.shape[1:])
    patches = patches.to(torch.int8).reshape(batch, groups, terms, height * width)
    total = exact_products(weight.reshape(groups, count // groups, terms), patches)
    sums = total.to(scale.dtype).reshape(batch, count, height, width)
    value = (sums * _by_channel(scale)) * steps.reshape(-1, 1, 1, 1)
    output = finish(value, None if bias is None else _by_channel(bias), residual, activation, input.dtype)
    return output.clone(memory_format=memory_format(input))  # with its strides, where several would do


def _by_channel(value: Tensor) -> Tensor:
    return value.reshape(1, -1, 1, 1)
