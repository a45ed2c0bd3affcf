"""The arguments of ``fit``, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .. import _checks
from .schedules import Schedule

OP = "fit"
Parameters = Sequence[nn.Parameter]
MakesOptimizer = torch.optim.Optimizer | Callable[[Parameters], torch.optim.Optimizer]
MakesScheduler = LRScheduler | Schedule | Callable[[torch.optim.Optimizer], LRScheduler]
Evaluates = Callable[[nn.Module], Any]
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """As in :func:`fastkd.distill.fit`, which says what they mean."""

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    shuffle: bool = True
    drop_last: bool = False
    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Any] | None = None
    seed: int = 0
    precision: str | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    evaluate: Evaluates | Mapping[str, Evaluates] | None = None
    evaluate_every: int | None = None
    monitor: str | None = None
    mode: str = "min"
    patience: int | None = None
    min_delta: float = 0.0
    keep: str = "last"
    out: str | os.PathLike[str] | None = None
    resume: bool | str = False
    save_every: int | None = None
    log_every: int = 10
    tensorboard: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            _checks.bad_value(OP, "epochs", "be given, or steps, and not both", (self.epochs, self.steps))
        for name in ("batch_size", "accumulate", "log_every"):
            _checks.count(OP, name, getattr(self, name))
        for name in ("epochs", "steps", "evaluate_every", "save_every", "patience"):
            if getattr(self, name) is not None:
                _checks.count(OP, name, getattr(self, name))
        if self.precision is not None:
            _checks.choice(OP, "precision", self.precision, tuple(PRECISIONS))
        if self.clip_norm is not None:
            _checks.positive(OP, "clip_norm", self.clip_norm)
        functions = self.evaluate.values() if isinstance(self.evaluate, Mapping) else [self.evaluate]
        for function in functions:
            if self.evaluate is not None and not callable(function):
                rule = "be a function of the student, or a dict of them"
                _checks.bad_type(OP, "evaluate", rule, type(function).__name__)
        _checks.choice(OP, "mode", self.mode, ("min", "max"))
        _checks.choice(OP, "keep", self.keep, ("last", "best"))
        _checks.not_negative(OP, "min_delta", self.min_delta)
        if self.resume not in (True, False, "auto"):
            _checks.bad_value(OP, "resume", 'be True, False or "auto"', repr(self.resume))
        if self.resume and self.out is None:
            _checks.bad_value(OP, "out", "be given with resume", None)
        if self.tensorboard and self.out is None:
            _checks.bad_value(OP, "out", "be given with tensorboard", None)

    @property
    def folder(self) -> Path | None:
        return None if self.out is None else Path(self.out)
