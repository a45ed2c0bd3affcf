"""What every implementation of an int8 layer is asked, and what it hands back.

``fastkd/_int8_operators.py`` checks a user's arguments. Each implementation has a file an operation, with a function::

    int8_linear.forward(input, weight, scale, bias, input_scale, residual, activation)          -> output
    int8_conv2d.forward(input, weight, scale, bias, input_scale, residual, activation, window)  -> output
    int8_embedding.forward(input, weight, scale, dtype)                                         -> output
    int8_weight_only.forward(input, weight, scale, bias, residual, activation)                  -> output

``input``: linear ``(M, K)`` with last stride 1 and any row stride; conv2d ``(B, C, H, W)``, contiguous or contiguous in
``torch.channels_last``; float16, bfloat16 or float32 (the reference takes float64 too), finite or not. embedding
``(M,)`` int64, contiguous. ``weight``: int8, contiguous, ``(N, K)``, ``(N, C / groups, kh, kw)`` or ``(V, K)``, where
-128 is a value like any other. ``scale`` and ``bias``: ``(N,)`` float32 (float64 for a float64 input), contiguous.
``input_scale``: 0-dim of the same dtype; None quantises each row (of a conv2d each image) by its own largest magnitude.
``residual``: shape, dtype and memory format of the output. Output: the input's dtype, contiguous, or in channels_last
if the input of conv2d is that and not contiguous too.

The numbers, in float32 (float64 for a float64 input), each operation rounded by itself::

    s = amax(|row|) / 127, or input_scale
    a = clamp(round_half_to_even(row / s), -127, 127)
    y = ((float(sum_k a_k w_nk) * scale_n) * s + bias_n) + residual
    output = activation(y), rounded to the input's dtype

The sum is an integer, exact for any K, and its conversion to float rounds once. So a sum has the same bits in every
implementation, and so has the output with the activations "none" and "relu". A row whose s is 0 has a = 0. A row (of a
conv2d an image) with a NaN or an infinity is NaN, with an ``input_scale`` too, and harms no other.

embedding: ``float(w) * scale`` of the row that each id names, rounded to ``dtype``. weight_only: as linear, with s = 1
and the sum ``sum_k x_k w_nk`` in float32, in any order.

What can only be seen by reading the data, an ``input_scale`` that is not positive and finite and an id that is out of
range, is an error on the CPU. On other devices the output is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127  # on each side of zero
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")  # in C++ known by number: csrc/cpu/int8.h


class Window(NamedTuple):
    """Where the taps of a convolution are, in rows and columns."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Of an image of this size; below 1 where the kernel is larger than the padded image."""
        return self._along(0, size[0], kernel[0]), self._along(1, size[1], kernel[1])

    def _along(self, axis: int, size: int, taps: int) -> int:
        reach = self.dilation[axis] * (taps - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def channel_scales(values: Tensor) -> Tensor:
    """amax(|values|) / 127 of each slice along dimension 0, NaN for one that is not finite."""
    wide = values.detach().to(compute_dtype(values.dtype)).flatten(1)
    amax = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    # A tensor, not a number: dividing by that CUDA would multiply by 1 / 127, which rounds differently.
    return torch.where(amax.isfinite(), amax / torch.full_like(amax, LEVELS), torch.nan)


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """int8 numbers of ``values / scale``, with one scale for each slice along dimension 0, or one for all (0-dim)."""
    wide = values.detach().to(scale.dtype)
    divisor = scale.reshape(-1, *[1] * (wide.ndim - 1)) if scale.ndim else scale
    steps = torch.where(divisor > 0, wide / divisor, 0)
    return steps.round().clamp(-LEVELS, LEVELS).nan_to_num(nan=0).to(torch.int8)


def quantize_channels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and scales of a layer: one scale for each slice along dimension 0."""
    scale = channel_scales(values)
    return quantize(values, scale), scale


def memory_format(input: Tensor) -> torch.memory_format:
    """Of the output of a convolution."""
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
