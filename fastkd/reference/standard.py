r"""Standardised logits: z = (s - mean) / (1e-7 + std), with the mean and the unbiased standard deviation of a row.

For a softmax that is a temperature of the row's own. With g = dL/dz, whose sum is 0, and n logits::

    dL/ds_j = (g_j - (s_j - mean) * sum_i g_i (s_i - mean) / ((n - 1) std (1e-7 + std))) / (1e-7 + std)

Masks (-inf, and all below :data:`fastkd._rows.MASK`) are no part of it. A row of equal logits, or of one, has std 0,
and z is 0 there; its slope has no bound, and is taken as 0.

Source: Sun et al. 2024, arXiv 2403.01878.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import MASK, SPREAD


def moments(logits: Tensor) -> Tensor:
    """(N, 3): max - mean, std, and how many logits count. A NaN or a +inf makes the first two NaN."""
    counted = _counted(logits)
    highest = logits.amax(-1, keepdim=True)
    count = counted.sum(-1, keepdim=True).to(logits.dtype)
    # Below the highest: there no offset costs digits, and equal logits have a std of exactly 0.
    below = torch.where(counted, highest - logits, 0.0)
    lift = below.sum(-1, keepdim=True) / count
    squares = torch.where(counted, (below - lift).square(), 0.0).sum(-1, keepdim=True)
    std = torch.where(count > 1, (squares / (count - 1)).sqrt(), 0.0 * lift)
    return torch.cat([lift, std, count], -1)


def spread(moments: Tensor) -> Tensor:
    """What centred logits are divided by: (N, 1). A NaN makes its row NaN by itself."""
    return SPREAD + moments[:, 1:2].nan_to_num(nan=1.0, posinf=1e30)


def through(grad: Tensor, logits: Tensor, moments: Tensor) -> Tensor:
    """dL/ds, from dL/dz / (1e-7 + std)."""
    lift, std, count = moments[:, 0:1], moments[:, 1:2], moments[:, 2:3]
    centred = torch.where(_counted(logits), (logits - logits.amax(-1, keepdim=True)) + lift, 0.0)
    along = (grad * centred).sum(-1, keepdim=True) / ((count - 1) * std * spread(moments))
    return torch.where(std == 0, 0.0, grad - along * centred)


def bounded(logits: Tensor) -> Tensor:
    """Masks of the lowest float, where a division cannot make them -inf."""
    return torch.where(logits == -torch.inf, logits, logits.clamp(min=MASK))


def _counted(logits: Tensor) -> Tensor:
    return ~(logits <= MASK)
