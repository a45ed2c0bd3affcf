"""Distillation of whole models: what is captured in them, the terms of the loss, teachers that stay as they are."""

from .batches import OfBatch, next_token_labels
from .capture import Capture
from .distiller import Distiller
from .fit import fit
from .group import Group
from .hard_samples import WSLD, Focal, LossQuantile, TeacherGap
from .initialize import Initialized, init_from_teacher
from .result import Result
from .schedules import Cosine, Function, Linear, Piecewise, Schedule, Warmup
from .stages import Stage, fit_chain, fit_stages
from .teacher import Teacher
from .term import Term

__all__ = [
    "WSLD",
    "Capture",
    "Cosine",
    "Distiller",
    "Focal",
    "Function",
    "Group",
    "Initialized",
    "Linear",
    "LossQuantile",
    "OfBatch",
    "Piecewise",
    "Result",
    "Schedule",
    "Stage",
    "Teacher",
    "TeacherGap",
    "Term",
    "Warmup",
    "fit",
    "fit_chain",
    "fit_stages",
    "init_from_teacher",
    "next_token_labels",
]
