r"""A linear layer whose weights alone are int8: ``y = activation( c_n sum_k x_mk w_nk + bias_n + residual_mn )``."""

from __future__ import annotations

import torch
from torch import Tensor

from .int8_linear import finish


def forward(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    with torch.autocast(input.device.type, enabled=False):
        total = input.to(scale.dtype) @ weight.T.to(scale.dtype)
    return finish(total * scale, bias, residual, activation, input.dtype)
