"""Packed weights of int8 layers: made when a layer first runs, kept as long as its weight is, and never saved.

They are found by the weight itself, so that modules need not know of them: a copy of a module packs its own weight. One
that was written to since, or that got other memory, is packed again. (As with what autograd saves, a write through
``.data`` leaves no trace and is not seen.)
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from . import extension
from .logit import CPU, _nowhere

_C = extension()
Shape = tuple[int, int, int, int, int]  # output channels, a group's input channels, taps, groups, taps of a line


class Packed(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[int, int, Shape]  # version, address, what it was packed for
    data: Tensor


_kept: dict[int, Packed] = {}


def packed(weight: Tensor, shape: Shape) -> Tensor:
    """The address is aligned as torch aligns. A weight without a version (of inference mode) is packed each time."""
    if weight.is_inference():
        return _pack(weight, shape)
    key, state = id(weight), (weight._version, weight.data_ptr(), shape)
    found = _kept.get(key)
    if found is not None and found.state == state and found.weight() is weight:
        return found.data
    data = _pack(weight, shape)
    _kept[key] = Packed(weakref.ref(weight, lambda gone: _forget(key, gone)), state, data)
    return data


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    """Unless the key is another tensor's by now."""
    found = _kept.get(key)
    if found is not None and found.weight is gone:
        del _kept[key]


def _pack(weight: Tensor, shape: Shape) -> Tensor:
    data = torch.empty(_C.int8_packed_bytes(shape), dtype=torch.uint8, device=CPU)
    _C.int8_pack(shape, weight.data_ptr() or _nowhere(weight), data.data_ptr(), torch.get_num_threads())
    return data
