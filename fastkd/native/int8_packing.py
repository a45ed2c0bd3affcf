"""Packed weights of int8 layers: made when a layer first runs, kept as long as its weight is, and never saved.

They are found by the weight itself, so that modules need not know of them: a copy of a module packs its own weight. One
that was written to since, or that got other memory, is packed again. (As with what autograd saves, a write through
``.data`` leaves no trace and is not seen.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._by_tensor import ByTensor
from . import extension
from .logit import CPU, _nowhere

_C = extension()
Shape = tuple[int, int, int, int, int]  # csrc/cpu/int8_pack.h: channels, a group's terms, taps, groups, taps of a line


class Packed(NamedTuple):
    state: tuple[int, int, Shape]  # version, address, what it was packed for
    data: Tensor


_kept: ByTensor[Packed] = ByTensor()


def packed(weight: Tensor, shape: Shape) -> Tensor:
    """The address is aligned as torch aligns. A weight without a version (of inference mode) is packed each time."""
    if weight.is_inference():
        return _pack(weight, shape)
    state = (weight._version, weight.data_ptr(), shape)
    found = _kept.get(weight)
    if found is None or found.state != state:
        found = Packed(state, _pack(weight, shape))
        _kept.set(weight, found)
    return found.data


def _pack(weight: Tensor, shape: Shape) -> Tensor:
    data = torch.empty(_C.int8_packed_bytes(shape), dtype=torch.uint8, device=CPU)
    _C.int8_pack(shape, weight.data_ptr() or _nowhere(weight), data.data_ptr(), torch.get_num_threads())
    return data
