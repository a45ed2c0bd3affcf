"""One part of the loss: which loss, of which tensors of both models, how much of it: :class:`Term`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from .. import _checks
from ..losses.logit import KDLoss
from ..losses.modules import KINDS, Adapter
from .batches import OfBatch
from .paths import parse
from .schedules import Function, Schedule

Paths = str | Sequence[str]
LOGITS: Final = "the logits of every teacher"


@dataclass(frozen=True)
class Now:
    """What a term may ask for beside the values of the two models."""

    batch: Any
    labels: Tensor | None
    step: int
    total: int
    normalizer: Any = None
    share: float | Tensor | None = None

    def of(self, term: Term, normalizer: Any, share: Any) -> Now:
        """With what a term divides its sum by, or is multiplied by."""
        if isinstance(normalizer, Mapping):
            normalizer = normalizer.get(term.name)
        left = normalizer is not None and not term.takes_normalizer
        if isinstance(share, Mapping):
            share = share.get(term.name)
        elif not left:
            share = None
        if left and share is None:
            _checks.bad_value("Distiller", "share", f"be given with normalizer, which {term.title} does not take", None)
        return replace(self, normalizer=normalizer, share=share)


class Term:
    """One part of a :class:`Distiller`'s loss: ``weight * loss(student, teacher, **options)``.

    What the loss gets is named by paths, as :class:`Capture` reads them; by default the logits of both. Several paths
    become a list of values.

    Args:
        loss: Any loss of fastkd, a module, or a function of student and teacher that returns a 0-dim tensor.
        student: Path in the student, or a list of paths.
        teacher: Path in the teacher, or a list. With several teachers a path begins with the teacher's name,
            ``"large/layer3"``; by default all teachers' logits, a list. None for a loss without a teacher, which is
            called with student and labels; by default that of a loss with an ``ignore_index`` and no argument
            ``teacher``, as ``cross_entropy``.
        weight: A number, a :class:`Schedule`, or a function of the fraction of training that is done. Where it is 0,
            the term is not computed, nor are its adapter or a teacher that nobody else asks for.
        adapt: ``"linear"`` or ``"conv"``: an :class:`fastkd.Adapter` from the student's width to the teacher's, which
            the first batch tells (:meth:`Distiller.prepare`). Or a module, used as it is, that takes the student's
            value. It belongs to the Distiller and is trained with it.
        target: Whether the labels are passed: by default to a loss with arguments ``teacher`` and ``target``, if the
            batch has labels, and to a loss without a teacher. Or a function of the batch that returns them.
        row_weight: A function of student, teacher and labels that returns weights for the loss's ``row_weight``, such
            as :class:`Focal`, called without gradients. Or a tensor, or an :class:`OfBatch`.
        name: For logging, ``<loss>/<path>`` by default.
        options: Keyword arguments of the loss. One that is a :class:`Schedule` has its value at the step, one that is
            an :class:`OfBatch` what the batch holds: ``mask=OfBatch("mask")``.

    Raises:
        TypeError, ValueError: a wrong type or value; an option that the loss does not take.

    Example:
        >>> from fastkd import cross_entropy, hint_loss, kd_loss
        >>> from fastkd.distill import Linear
        >>> Term(kd_loss, temperature=Linear(4.0, 1.0), alpha=0.1)
        Term(kd_loss, '', '')
        >>> Term(hint_loss, "layer3", "encoder.5", weight=100.0, adapt="conv")
        Term(hint_loss, 'layer3', 'encoder.5', weight=100.0)
        >>> Term(cross_entropy)
        Term(cross_entropy, '', None)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        student: Paths = "",
        teacher: Paths | None = LOGITS,
        *,
        weight: float | Schedule | Callable[[float], float] = 1.0,
        adapt: str | nn.Module | None = None,
        target: bool | Callable[[Any], Tensor] | None = None,
        row_weight: Callable[..., Tensor] | Tensor | OfBatch | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if not callable(loss):
            _checks.bad_type("Term", "loss", "be a function or a module", type(loss).__name__)
        self.loss, self.options, self.row_weight = loss, options, row_weight
        named = loss.func if isinstance(loss, functools.partial) else loss
        self.title = getattr(named, "__name__", type(named).__name__)
        self._read_signature()
        if (
            teacher == LOGITS
            and "teacher" not in self._names
            and ("ignore_index" in self._names or hasattr(loss, "ignore_index"))
        ):
            teacher = None
        self.student, self.teacher = student, teacher
        for path in listed(student):
            parse("Term", path)
        self.weight = self._weight(weight)
        self.adapt = self._adapt(adapt)
        default = teacher is None or {"teacher", "target"} <= self._names
        self.target: bool | Callable[[Any], Tensor] = default if target is None else target
        first = next(iter(listed(student)), "")
        self.name = name or (f"{self.title}/{first}" if first else self.title)

    def _read_signature(self) -> None:
        loss = self.loss.forward if isinstance(self.loss, nn.Module) else self.loss
        try:
            known = inspect.signature(loss).parameters
        except ValueError:  # some of torch's functions have none
            self._names, self._takes_any, self._needs_target = set[str](), True, False
        else:
            self._names = set(known)
            self._takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
            self._needs_target = "target" in known and known["target"].default is inspect.Parameter.empty
        given = {**self.options, **({} if self.row_weight is None else {"row_weight": None})}
        for option in given:
            if option not in self._names and not self._takes_any:
                _checks.bad_type("Term", option, f"be an argument of {self.title}", option)
        if "return_parts" in self.options:
            _checks.bad_type("Term", "return_parts", "be left out: a term is one number", self.options["return_parts"])

    def _weight(self, weight: Any) -> float | Schedule:
        if isinstance(weight, Schedule):
            return weight
        return Function(weight) if callable(weight) else _checks.finite("Term", "weight", weight)

    def _adapt(self, adapt: Any) -> str | nn.Module | None:
        if adapt is None or isinstance(adapt, nn.Module):
            return adapt
        if not isinstance(adapt, str):
            _checks.bad_type("Term", "adapt", f"be a module or one of {', '.join(KINDS)}", type(adapt).__name__)
        _checks.choice("Term", "adapt", adapt, KINDS)
        if not isinstance(self.student, str) or not isinstance(self.teacher, str):
            _checks.bad_value("Term", "adapt", "be a module where there are several paths or no teacher", repr(adapt))
        return adapt

    def __repr__(self) -> str:
        teacher = "" if self.teacher == LOGITS else self.teacher
        weight = "" if self.weight == 1.0 else f", weight={self.weight}"
        return f"Term({self.title}, {self.student!r}, {teacher!r}{weight})"

    @property
    def key(self) -> str:
        """Its name where a name can have no dot."""
        return self.name.replace(".", "_")

    @property
    def scheduled(self) -> bool:
        return any(isinstance(value, Schedule) for value in (self.weight, *self.options.values()))

    def weight_at(self, step: int, total: int) -> float:
        return self.weight.value(step, total) if isinstance(self.weight, Schedule) else self.weight

    def adapter_for(self, student: Any, teacher: Any) -> Adapter:
        """Of the widths that these values have."""
        assert isinstance(self.adapt, str)
        dim = 1 if self.adapt == "conv" else -1
        for who, value in (("student", student), ("teacher", teacher)):
            if not isinstance(value, Tensor) or value.ndim < 2:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                _checks.bad_value("Term", "adapt", f"be for tensors of 2 or more dimensions ({self.name}, {who})", got)
        return Adapter(self.adapt, student.shape[dim], teacher.shape[dim]).to(student.device)

    def compute(self, student: Any, teacher: Any, now: Now) -> Tensor:
        """The loss before its weight, of what the paths name. The student's value is adapted already."""
        options = {name: self._option(value, now) for name, value in self.options.items()}
        arguments = [student] if self.teacher is None else [student, teacher]
        labels = self._labels(now)
        if labels is None and self.target and self._needs_target:
            _checks.bad_value(f"term {self.name!r}", "the batch", "have labels", None)
        if labels is not None and self.teacher is None:
            arguments.append(labels)
        elif labels is not None:
            options["target"] = labels
        if self.row_weight is not None:
            options["row_weight"] = self._row_weight(
                student, teacher, labels if labels is not None else now.labels, now
            )
        if now.normalizer is not None and self.takes_normalizer:
            options["normalizer"] = now.normalizer
        try:
            loss = self.loss(*arguments, **options)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"term {self.name!r}: {error}") from error
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            _checks.bad_type("Term", "loss", f"return a 0-dim tensor ({self.name})", got)
        return loss if now.share is None else loss * now.share

    @property
    def takes_normalizer(self) -> bool:
        return "normalizer" in self._names or isinstance(self.loss, KDLoss)

    def _option(self, value: Any, now: Now) -> Any:
        if isinstance(value, Schedule):
            return value.value(now.step, now.total)
        return value(now.batch) if isinstance(value, OfBatch) else value

    def _labels(self, now: Now) -> Tensor | None:
        if callable(self.target):
            return self.target(now.batch)
        return now.labels if self.target else None

    def _row_weight(self, student: Any, teacher: Any, labels: Tensor | None, now: Now) -> Tensor:
        given = self.row_weight
        if isinstance(given, Tensor):
            return given
        if isinstance(given, OfBatch):
            weight: Tensor = given(now.batch)
            return weight
        assert given is not None
        options = {name: self.options[name] for name in ("dim", "ignore_index") if name in self.options}
        with torch.no_grad():
            return given(student, teacher, labels, **options)


def listed(paths: Paths | None) -> Sequence[str]:
    return () if paths is None else [paths] if isinstance(paths, str) else list(paths)
