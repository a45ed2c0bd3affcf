"""Distillation of whole models: what is captured in them, the terms of the loss, teachers that stay as they are."""

from .batches import OfBatch
from .capture import Capture
from .distiller import Distiller
from .schedules import Cosine, Function, Linear, Piecewise, Schedule, Warmup
from .teacher import Teacher
from .term import Term

__all__ = [
    "Capture",
    "Cosine",
    "Distiller",
    "Function",
    "Linear",
    "OfBatch",
    "Piecewise",
    "Schedule",
    "Teacher",
    "Term",
    "Warmup",
]
