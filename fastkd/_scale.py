"""A factor that costs no digit, so that no square leaves the range of float32."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_two(x: Tensor, dim: int | None = None) -> Tensor:
    """Near the largest element; of each row, if ``dim`` names the dimension that is to be left with one element."""
    if x.numel() == 0:
        return x.new_ones(())
    largest = x.detach().abs().amax() if dim is None else x.detach().abs().amax(dim, keepdim=True)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
