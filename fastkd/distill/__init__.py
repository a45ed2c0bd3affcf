"""Distillation of whole models: what is captured in them, the terms of the loss, teachers that stay as they are."""

from .batches import OfBatch, next_token_labels
from .capture import Capture
from .distiller import Distiller
from .hard_samples import WSLD, Focal, LossQuantile, TeacherGap
from .initialize import Initialized, init_from_teacher
from .schedules import Cosine, Function, Linear, Piecewise, Schedule, Warmup
from .teacher import Teacher
from .term import Term

__all__ = [
    "WSLD",
    "Capture",
    "Cosine",
    "Distiller",
    "Focal",
    "Function",
    "Initialized",
    "Linear",
    "LossQuantile",
    "OfBatch",
    "Piecewise",
    "Schedule",
    "Teacher",
    "TeacherGap",
    "Term",
    "Warmup",
    "init_from_teacher",
    "next_token_labels",
]
