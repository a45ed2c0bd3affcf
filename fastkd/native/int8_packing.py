"""Packed weights of int8 layers: made when a layer first runs, kept as long as its weight is, and never saved.

They are found by the weight itself, so that modules need not know of them: a copy of a module packs its own weight. One
that was written to since, or that got other memory, is packed again. (As with what autograd saves, a write through
``.data`` leaves no trace and is not seen.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._by_tensor import ByTensor
from . import extension
from .logit import CPU, _nowhere

_C = extension()
Shape = tuple[int, int, int, int, int]  # csrc/cpu/int8_pack.h: channels, a group's terms, taps, groups, taps of a line


@dataclass(slots=True)
class Kept:
    state: tuple[int, int]  # version, address
    packed: dict[Shape, Tensor] = field(default_factory=dict)
    transformed: dict[Shape, Tensor | None] = field(default_factory=dict)


_kept: ByTensor[Kept] = ByTensor()


def packed(weight: Tensor, shape: Shape) -> Tensor:
    """The address is aligned as torch aligns. A weight without a version (of inference mode) is packed each time."""
    if weight.is_inference():
        return _pack(weight, shape)
    found = _of(weight).packed
    if shape not in found:
        found[shape] = _pack(weight, shape)
    return found[shape]


def transformed(weight: Tensor, shape: Shape) -> Tensor | None:
    """For Winograd's convolution (csrc/cpu/int8_winograd.h), of eight times the weight's size.

    None, where its sums could be too large for that way, or the weight would be transformed each time.
    """
    if weight.is_inference():
        return None
    found = _of(weight).transformed
    if shape not in found:
        found[shape] = _transform(weight, shape)
    return found[shape]


def _of(weight: Tensor) -> Kept:
    state = (weight._version, weight.data_ptr())
    found = _kept.get(weight)
    if found is None or found.state != state:
        found = Kept(state)
        _kept.set(weight, found)
    return found


def _pack(weight: Tensor, shape: Shape) -> Tensor:
    data = torch.empty(_C.int8_packed_bytes(shape), dtype=torch.uint8, device=CPU)
    _C.int8_pack(shape, weight.data_ptr() or _nowhere(weight), data.data_ptr(), torch.get_num_threads())
    return data


def _transform(weight: Tensor, shape: Shape) -> Tensor | None:
    data = torch.empty(_C.int8_winograd_bytes(shape), dtype=torch.uint8, device=CPU)
    fits = _C.int8_winograd_pack(shape, weight.data_ptr(), data.data_ptr(), torch.get_num_threads())
    return data if fits else None
