"""Runs of several parts: stages of one student, and chains in which each student teaches the next."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from .. import _checks
from . import ranks
from .distiller import Distiller, Given
from .records import LAST, refuse_run
from .result import Result
from .term import Term

SEPARATORS = frozenset("/\\:")  # on any system that the folder may be copied to
Teachers = Given | Sequence[Given] | Mapping[str, Given] | None


class Stage:
    """One part of :func:`fit_stages`: its terms, and what else is different in it.

    Args:
        terms: As a Distiller takes them. Adapters are made anew in each stage; one that is to live on is a module,
            given as ``adapt``.
        trainable: Patterns of the names of the student's parameters, as ``["layer1.*", "stem.*"]``: these learn, and
            no others. By default those learn that do.
        name: Of the stage's folder.
        options: Arguments of :func:`fit` that are different in this stage, as ``epochs`` or ``optimizer``.

    Example:
        >>> from fastkd import hint_loss
        >>> from fastkd.distill import Stage, Term
        >>> Stage([Term(hint_loss, "body", "body", adapt="linear")], trainable=["body.*"], epochs=5, name="hint").name
        'hint'
    """

    def __init__(
        self,
        terms: Sequence[Term],
        *,
        trainable: Sequence[str] | None = None,
        name: str = "stage",
        **options: Any,
    ) -> None:
        if isinstance(trainable, str):
            _checks.bad_type("Stage", "trainable", "be a sequence of patterns", "a string")
        if not isinstance(name, str) or not name.isprintable() or not name.strip(". ") or set(name) & SEPARATORS:
            rule = f"be the name of a folder, without {' '.join(sorted(SEPARATORS))}"
            _checks.bad_value("Stage", "name", rule, repr(name))
        self.terms, self.trainable, self.name, self.options = terms, trainable, name, options


def fit_stages(
    student: nn.Module,
    teacher: Teachers,
    stages: Sequence[Stage],
    train: Any,
    val: Any = None,
    *,
    out: Any = None,
    resume: bool | str = False,
    distiller: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Result]:
    """Train a student in several stages, each with its own terms, parameters and optimizer. Same as::

        for stage in stages:
            Distiller(student, teacher, stage.terms).fit(train, val, **{**options, **stage.options})

    with the parameters that do not learn in a stage frozen meanwhile. A run that was killed goes on in the stage and at
    the step where it was.

    Args:
        student, teacher: As a Distiller takes them.
        stages: A list of :class:`Stage`.
        train, val: As :func:`fit` takes them; a stage may have its own among its options.
        out: A folder, with one for each stage in it, ``0-<name>`` and so on.
        resume: As for :func:`fit`.
        distiller: Arguments of the Distillers, as ``{"inputs": ...}``.
        options: Arguments of :func:`fit` for all stages.

    Returns:
        The :class:`Result` of each stage.

    Example:
        >>> import torch
        >>> from fastkd import hint_loss, kd_loss
        >>> from fastkd.distill import Stage, Term, fit_stages
        >>> def network(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
        >>> rows = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randint(2, (20,)))
        >>> hint = Stage([Term(hint_loss, "0", "0", adapt="linear")], trainable=["0.*"], epochs=2)
        >>> [one.step for one in fit_stages(network(3), network(8), [hint, Stage([Term(kd_loss)], epochs=1)], rows)]
        [2, 1]
    """
    if isinstance(stages, Stage):
        _checks.bad_type("fit_stages", "stages", "be a list of Stage", "one")
    for stage in stages:
        if not isinstance(stage, Stage):
            _checks.bad_type("fit_stages", "stages", "be a list of Stage", type(stage).__name__)
    folders = _folders("fit_stages", out, [stage.name for stage in stages], resume)
    results = []
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
        with _learning(student, stage.trainable):
            one = Distiller(student, teacher, stage.terms, **(distiller or {}))
            given = {"train": train, "val": val, **options, **stage.options}
            results.append(one.fit(out=folder, resume=_resume(resume, number), **given))
    return results


def fit_chain(
    models: Sequence[Given],
    terms: Sequence[Term] | Callable[[nn.Module, nn.Module], Sequence[Term]],
    train: Any,
    val: Any = None,
    *,
    out: Any = None,
    resume: bool | str = False,
    distiller: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Result]:
    """Train each model after the one before it, so that a large teacher reaches a small student in smaller steps
    (teacher assistants, https://arxiv.org/abs/1902.03393). Same as::

        for teacher, student in zip(models, models[1:]):
            Distiller(student, teacher, terms).fit(train, val, **options)

    Args:
        models: The teacher, then students, from large to small.
        terms: For each pair; or a function of teacher and student that returns them, if paths or adapters differ.
        train, val, out, resume, distiller, options: As for :func:`fit_stages`; the folders are ``0-student`` and so on.

    Returns:
        The :class:`Result` of each student.
    """
    if len(models) < 2:
        _checks.bad_value("fit_chain", "models", "be a teacher and one student or more", f"{len(models)} models")
    folders = _folders("fit_chain", out, ["student"] * (len(models) - 1), resume)
    results = []
    for number, (teacher, student) in enumerate(pairwise(models)):
        if not isinstance(student, nn.Module):
            _checks.bad_type("fit_chain", "models", "be modules after the first", type(student).__name__)
        if callable(terms):
            taught = teacher if isinstance(teacher, nn.Module) else teacher.model
            chosen = terms(taught, student)
        else:
            chosen = terms
        one = Distiller(student, teacher, chosen, **(distiller or {}))
        results.append(one.fit(train, val, out=folders[number], resume=_resume(resume, number), **options))
    return results


def _folders(op: str, out: Any, names: Sequence[str], resume: bool | str) -> list[Path | None]:
    """Of each part. None of them begins if the run of one would be refused."""
    if out is None:
        return [None] * len(names)
    folders = [Path(out) / f"{number}-{name}" for number, name in enumerate(names)]
    there = ranks.from_first([folder for folder in folders if (folder / LAST).exists()])
    if there and not resume:
        refuse_run(op, there[0])
    return [*folders]


def _resume(resume: bool | str, number: int) -> bool | str:
    """Of a run that is demanded the first part has to be there."""
    return "auto" if resume is True and number > 0 else resume


@contextmanager
def _learning(student: nn.Module, patterns: Sequence[str] | None) -> Iterator[None]:
    """Parameters whose names match learn, and the others do not; afterwards all are as they were."""
    named = dict(student.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in named.items()}
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
            near = difflib.get_close_matches(pattern, named, n=5, cutoff=0.3) or list(named)[:10]
            rule = f"match parameters of the student, such as {', '.join(map(repr, near))}"
            _checks.bad_value("Stage", "trainable", rule, repr(pattern))
    try:
        if patterns is not None:
            for name, parameter in named.items():
                parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        yield
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])
