"""A teacher's vocabulary in terms of the student's: checked once for a tensor, and remembered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _checks

_known: Any = WeakIdKeyDictionary()  # tensor -> (its version and the student's vocabulary, its pairs)


def check(op: str, value: Any, device: torch.device) -> None:
    """What can be seen without looking at the ids."""
    if not isinstance(value, Tensor):
        _checks.bad_type(op, "vocab_map", "be a tensor of ids", type(value).__name__)
    if value.dtype not in _checks.INTEGERS:
        _checks.bad_type(op, "vocab_map", "hold integer ids", value.dtype)
    if value.ndim != 1:
        _checks.bad_value(op, "vocab_map", "have shape (teacher's vocabulary,)", tuple(value.shape))
    if value.device != device:
        _checks.bad_value(op, "vocab_map", f"be on the student's device, {device}", value.device)


def places(mapping: Tensor) -> Tensor:
    """``(V_teacher,)``: which pair an id of the teacher's is in, or -1."""
    mapped = mapping >= 0
    return torch.where(mapped, mapped.cumsum(0) - 1, -1)


def pairs(op: str, value: Tensor, student: int) -> Tensor:
    """``(2, n)``: ids of the student and of the teacher that mean the same. Looking at them waits for a GPU, once."""
    if value.is_inference():  # it counts no versions
        return _make(op, value.long(), student)
    key = (value._version, student)
    if value not in _known or _known[value][0] != key:
        _known[value] = key, _make(op, value.detach().long(), student)
    return _known[value][1]  # type: ignore[no-any-return]


def _make(op: str, ids: Tensor, vocabulary: int) -> Tensor:
    outside = (ids < -1) | (ids >= vocabulary)
    if bool(outside.any()):
        _checks.bad_value(op, "vocab_map", f"hold ids from 0 to {vocabulary - 1}, or -1", int(ids[outside][0]))
    taught = (ids >= 0).nonzero().squeeze(1)
    if len(taught) == 0:
        _checks.bad_value(op, "vocab_map", "map at least one id", "-1 everywhere")
    student = ids[taught]
    ordered = student.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        _checks.bad_value(op, "vocab_map", "hold no id twice", int(twice[0]))
    return torch.stack([student, taught])
