"""What is summed in float64. The shortcuts take differences of large sums, whose digits float32 would lose."""

from __future__ import annotations

from torch import Tensor

from .._features import kept

NARROW = ("mps",)  # devices that have no float64


def widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type in NARROW else tensor.double()


@kept
def wide(features: Tensor) -> Tensor:
    return widen(features)
