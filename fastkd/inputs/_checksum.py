"""Whether weights are those that something was made with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SLAB = 2**22  # elements that are widened to float64 at a time
CLOSE = 1e-9  # devices add up in another order

INFINITE = {"nan": 3.0, "posinf": 5.0, "neginf": -7.0}  # a bias of -inf masks an id

_known: Any = WeakIdKeyDictionary()  # tensor -> (its version and address, its sum)


def checksum(weight: Tensor, bias: Tensor | None) -> float:
    """A number that other weights hardly have: a dot product with fixed irregular numbers, in float64.

    Remembered for a tensor as long as it is not modified, since reading a weight takes time and waits for a GPU.
    """
    return _sum(weight) + (0.0 if bias is None else math.pi * _sum(bias))


def agree(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)


def _sum(tensor: Tensor) -> float:
    # Tensors of inference mode count no versions; `tensor.data = other` is none.
    version = None if tensor.is_inference() else (tensor._version, tensor.data_ptr())
    if version is not None and tensor in _known and _known[tensor][0] == version:
        return float(_known[tensor][1])
    rows = tensor.detach().reshape(len(tensor), -1)
    width = rows.shape[1]
    columns = torch.sin(1 + 0.7548776662 * torch.arange(width, dtype=torch.float64, device=rows.device))
    step, total = max(1, SLAB // max(1, width)), rows.new_zeros((), dtype=torch.float64)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step].double().nan_to_num(**INFINITE)
        lines = torch.arange(begin, begin + len(part), dtype=torch.float64, device=rows.device)
        total += (part @ columns) @ torch.cos(0.5698402910 * lines)
    _known[tensor] = version, float(total)
    return float(total)
