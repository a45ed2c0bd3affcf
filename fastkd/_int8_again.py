"""An int8 layer that is called as it was called last, of which nothing has to be looked at again.

A kernel goes through all of a processor's caches, and after it Python's own work costs a multiple of what a loop of
empty calls shows: of a layer of 1024 x 1024, checks whose answers were those of the call before took 5 us of 22 on one
row, and 20 of 350 on 128. So the last call of each weight is kept, with what made it what it was. It is made again only
where all of that is the same: the very tensors, at the same addresses, an input of the same shape, strides and dtype,
the same options. Whatever differs goes through the checks again, and says there what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from types import NoneType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._by_tensor import ByTensor

Options = tuple[object, ...]
Tensors = tuple[Tensor | None, ...]


@dataclass(slots=True)
class Last:
    others: Tensors
    options: Options
    state: tuple[object, ...]
    call: Callable[[Tensor], Tensor]
    missed: bool = False  # by the call before: inputs of two shapes in turn would only replace each other


_last: ByTensor[Last] = ByTensor()


def again(input: Tensor, weight: Tensor, others: Tensors, options: Options) -> Tensor | None:
    """The output, or None where this is another call than the last one. `others` are the scale, the bias, and so on."""
    last = _last.get(weight)
    if last is None:
        return None
    same = all(map(is_, others, last.others)) and all(map(is_, options, last.options)) and _is_plain(input, others)
    if not same or _state(input, weight, others) != last.state:
        return None
    last.missed = False
    return last.call(input)


def keep(input: Tensor, weight: Tensor, others: Tensors, options: Options, call: Callable[[Tensor], Tensor]) -> None:
    """For a call that took the memory of just these tensors."""
    last = _last.get(weight)
    if last is not None and not last.missed:
        last.missed = True
        return
    lasting = all(isinstance(option, (str, int, tuple, NoneType)) for option in options)  # a list may change
    if lasting and not weight.is_inference() and _is_plain(input, others):
        _last.set(weight, Last(others, options, _state(input, weight, others), call))


def _is_plain(input: Tensor, others: Tensors) -> bool:
    """Whether the input is memory of the CPU, and nothing follows what is computed with it."""
    if type(input) is not Tensor or input.layout is not torch.strided or not input.is_cpu or input.is_neg():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not input.requires_grad and not any(other is not None and other.requires_grad for other in others)


def _state(input: Tensor, weight: Tensor, others: Tensors) -> tuple[object, ...]:
    """What is different once a weight was written to, or a tensor has other memory."""
    state = (input.dtype, input.shape, input.stride(), weight._version, weight.data_ptr(), weight.nbytes)
    return state + tuple([0 if other is None else (other.data_ptr(), other.nbytes) for other in others])
