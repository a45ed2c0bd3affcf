"""The checks that losses on features share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._features import Features

REDUCTIONS = ("mean", "sum")
MODIFIED = "the teacher's features were modified in place after prepare_teacher"


def features(op: str, student: Any, teacher: Any) -> tuple[Tensor, Features]:
    """Both as they were given, the teacher with what is known of it already."""
    _checks.floats(op, "student", student)
    if not isinstance(teacher, Features):
        _checks.floats(op, "teacher", teacher)
        teacher = Features(teacher)
    elif not torch.compiler.is_compiling() and teacher.modified:
        raise RuntimeError(f"{op}: {MODIFIED}")
    _checks.same_device(op, "teacher", teacher.tensor, student)
    return student, teacher


def rows(op: str, student: Any, teacher: Any) -> tuple[Tensor, Features]:
    """``(N, D)`` each; D may differ."""
    student, prepared = features(op, student, teacher)
    for argument, tensor in (("student", student), ("teacher", prepared.tensor)):
        if tensor.ndim != 2:
            _checks.bad_value(op, argument, "have the shape (N, D)", tuple(tensor.shape))
    if student.shape[0] != prepared.tensor.shape[0]:
        rule = f"have as many rows as the student, {student.shape[0]}"
        _checks.bad_value(op, "teacher", rule, prepared.tensor.shape[0])
    return student, prepared
