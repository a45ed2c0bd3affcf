"""A teacher's vocabulary in terms of the student's: checked once for a tensor, and remembered."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _checks


class VocabMap(NamedTuple):
    pairs: Tensor  # (2, n): ids of the student and of the teacher that mean the same
    places: Tensor  # (V_teacher,): which pair an id of the teacher's is in, or -1


_known: Any = WeakIdKeyDictionary()  # tensor -> (its version, the vocabularies' sizes, VocabMap)


def vocab_map(op: str, value: Any, student: int, device: torch.device) -> VocabMap:
    """``value``: int64 ``(V_teacher,)``, the student's id or -1. Looking at it waits for a GPU, the first time."""
    if not isinstance(value, Tensor):
        _checks.bad_type(op, "vocab_map", "be a tensor of ids", type(value).__name__)
    if value.dtype not in _checks.INTEGERS:
        _checks.bad_type(op, "vocab_map", "hold integer ids", value.dtype)
    if value.ndim != 1:
        _checks.bad_value(op, "vocab_map", "have shape (teacher's vocabulary,)", tuple(value.shape))
    if value.device != device:
        _checks.bad_value(op, "vocab_map", f"be on the student's device, {device}", value.device)
    key = (-1 if value.is_inference() else value._version, student)
    if value in _known and _known[value][0] == key:
        return _known[value][1]  # type: ignore[no-any-return]
    made = _make(op, value.detach().long(), student)
    _known[value] = key, made
    return made


def _make(op: str, ids: Tensor, vocabulary: int) -> VocabMap:
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
    places = torch.full_like(ids, -1)
    places[taught] = torch.arange(len(taught), device=ids.device)
    return VocabMap(torch.stack([student, taught]), places)
