"""Logits of a head whose weight is int8: without a float copy of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._int8_operators import linear

if TYPE_CHECKING:
    from .head import Head

SLAB = 16 * 2**20  # bytes of a weight that is widened at a time


def logits_of(head: Head, hidden: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Of these rows, in the head's dtype. ``dtype``: what the matmul is in; one of 16 bits on a GPU alone.

    int8 numbers are the same in every float dtype, so that the scales are multiplied in after the matmul: whatever its
    dtype, no weight is rounded again.
    """
    wide = head.dtype
    assert head.weight_scale is not None
    weight, scale = head.weight, head.weight_scale.detach()  # itself: that is what packed weights are found by
    bias = None if head.bias is None else head.bias.detach()
    if head.round_input:
        result = linear(hidden.to(wide), weight, scale, bias)
        return finished(head, result if head.scale == 1 else result.mul_(head.scale))
    result = hidden.new_empty((len(hidden), len(weight)), dtype=wide) if out is None else out
    operand, factor = hidden.to(dtype), scale.to(wide) * head.scale
    step = max(1, SLAB // (weight.shape[1] * dtype.itemsize or 1))
    for begin in range(0, len(weight), step):
        ids = slice(begin, begin + step)
        part, slab = result[:, ids], weight[ids].to(dtype).t()
        if dtype is wide:
            torch.mm(operand, slab, out=part)
        else:
            torch.mm(operand, slab, out_dtype=wide, out=part)
        if bias is None:
            part.mul_(factor[ids])
        else:
            torch.addcmul(bias[ids].to(wide) * head.scale, part, factor[ids], out=part)
    return finished(head, result)


def finished(head: Head, logits: Tensor) -> Tensor:
    return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)
