r"""A linear layer in int8: rows are quantised, sums of products are exact integers, and one formula ends them.

With s_m = max_k |x_mk| / 127 (or a given scale), a_mk = round(x_mk / s_m) in [-127, 127] and int8 weights w_nk that
stand for w_nk c_n::

    y_mn = activation( s_m c_n sum_k a_mk w_nk + bias_n + residual_mn )

:mod:`fastkd._int8` has the order of the roundings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._int8 import channel_scales, compute_dtype, quantize
from .._int8_arguments import bad_step

CHUNK = 1024  # 1024 products of int8 numbers add up to less than 2^24: exact in float32, and in TF32 too


def forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    levels, steps = quantized(input, input_scale, "int8_linear")
    total = exact_products(levels, weight.T)
    value = (total.to(scale.dtype) * scale) * steps.unsqueeze(1)
    return finish(value, bias, residual, activation, input.dtype)


def quantized(input: Tensor, input_scale: Tensor | None, op: str) -> tuple[Tensor, Tensor]:
    """int8 numbers, and the scale of each slice along dimension 0: NaN for one that is not finite."""
    wide = input.to(compute_dtype(input.dtype))
    if input_scale is None:
        steps = channel_scales(wide)
        return quantize(wide, steps), steps
    checked = checked_scale(input_scale, op)
    finite = wide.isfinite().flatten(1).all(1)
    return quantize(wide, checked), torch.where(finite, checked, torch.nan)


def checked_scale(input_scale: Tensor, op: str) -> Tensor:
    if input_scale.device.type == "cpu":
        value = input_scale.item()
        if not (value > 0 and math.isfinite(value)):
            bad_step(op, value)
        return input_scale
    return torch.where((input_scale > 0) & input_scale.isfinite(), input_scale, torch.nan)


def exact_products(levels: Tensor, weight: Tensor) -> Tensor:
    """The matrix product of int8 numbers, as int64: torch multiplies integer matrices on the CPU alone."""
    chunks = zip(levels.split(CHUNK, -1), weight.split(CHUNK, -2), strict=True)
    with torch.autocast(levels.device.type, enabled=False):  # it would round the integers
        return torch.stack([(a.float() @ w.float()).to(torch.int64) for a, w in chunks]).sum(0)


def finish(value: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        value = value + bias
    if residual is not None:
        value = value + residual.to(value.dtype)
    return activated(value, activation).to(dtype)


def activated(value: Tensor, activation: str) -> Tensor:
    """Of -inf too; gelu in the forms whose small results are no differences of large numbers, as torch's are."""
    if activation == "none":
        return value
    if activation == "relu":
        return value.relu()
    if activation == "silu":
        result = F.silu(value)
    elif activation == "gelu":
        result = value * (0.5 * torch.special.erfc(value * -math.sqrt(0.5)))
    else:
        result = value * torch.sigmoid((value + 0.044715 * value**3) * (2 * math.sqrt(2 / math.pi)))
    return result.masked_fill(value == -torch.inf, 0.0)
