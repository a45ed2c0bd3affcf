"""A student, its teachers and the terms of the loss between them: :class:`Distiller`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _checks
from . import batches
from .capture import Capture
from .checking import check_models, check_optimizer, check_paths, check_terms, learns
from .fit import fit
from .teacher import Teacher, frozen
from .term import LOGITS, Now, Term, listed

Given = nn.Module | Teacher
Values = dict[str, Any]


class Distiller(nn.Module):
    """Computes the loss of a student from batches, for any training loop. Same as, with one term on logits::

        with torch.no_grad():
            taught = teacher.eval()(inputs)
        loss = weight * kd_loss(student(inputs), taught, labels)

    and with what other terms name of the inside of both models captured in the same two forwards. The parameters of
    this module, and its ``state_dict``, are the student's and the adapters': never a teacher's. ``to(device)`` moves
    the teachers too.

    For several processes wrap the Distiller, not the student: ``DistributedDataParallel(distiller)(batch)`` is
    ``distiller.loss(batch)`` with the gradients of student and adapters averaged. ``torch.compile`` the student, and
    the teacher, before the first call.

    Args:
        student: The model that learns. Its mode is left as it is.
        teacher: A model or a :class:`Teacher`; several as a list, where they are called ``"0"``, ``"1"``, or as a dict
            by name; None for terms without a teacher.
        terms: A list of :class:`Term`, with different names.
        inputs: A function of the batch that returns what the models are called with: a dict of keyword arguments, a
            tuple of arguments, or the one argument. By default the first item of a tuple, or all of a mapping but
            ``"labels"``.
        labels: A function of the batch; by default the second item, or ``"labels"``. Where these are the input ids of a
            language model: :func:`next_token_labels`.
        teacher_inputs: A function of the batch for the teachers, if they take other inputs; or a dict of them by
            teacher.
        forward: A function of model and inputs, instead of the call; it returns the model's output.
        cache: A function of the batch that returns teachers' values by path, as :meth:`teach` does, or None to run the
            teachers. By default the mapping's ``"teacher_outputs"``.

    Raises:
        TypeError, ValueError: a wrong type; no such path; models that share parameters; a student of which nothing
            learns; two terms of one name.

    Example:
        >>> from fastkd import hint_loss, kd_loss
        >>> student = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> terms = [Term(kd_loss, temperature=2.0), Term(hint_loss, "0", "0", weight=0.1, adapt="linear")]
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
        >>> distiller = Distiller(student, teacher, terms).prepare(batch)
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        >>> loss, parts = distiller.loss(batch)
        >>> loss.backward()
        >>> sorted(parts)
        ['hint_loss/0', 'kd_loss']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Given | Sequence[Given] | Mapping[str, Given] | None,
        terms: Sequence[Term],
        *,
        inputs: Callable[[Any], Any] | None = None,
        labels: Callable[[Any], Any] | None = None,
        teacher_inputs: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        cache: Callable[[Any], Mapping[str, Any] | None] | None = None,
    ) -> None:
        super().__init__()
        # A single teacher has no name, and its paths no prefix.
        self._single = not isinstance(teacher, (Sequence, Mapping))
        self.teachers: dict[str, Teacher] = {name: _as_teacher(one) for name, one in _named(teacher).items()}
        check_models(student, self._models())
        check_terms(terms)
        self.student = student
        self.terms = list(terms)
        self.adapters, self.losses = nn.ModuleDict(), nn.ModuleDict()
        for term in self.terms:
            if isinstance(term.adapt, nn.Module):
                self.adapters[term.key] = term.adapt
            if isinstance(term.loss, nn.Module):
                self.losses[term.key] = term.loss
        self._inputs, self._labels = inputs or batches.inputs_of, labels or batches.labels_of
        self._teacher_inputs, self._call = teacher_inputs or self._inputs, forward or batches.call
        self._cached = cache or batches.cached_of
        self._step: tuple[int, int] | None = None
        self._captures = self._make_captures()
        lazy = any(isinstance(term.adapt, str) for term in self.terms)
        if not lazy and not any(parameter.requires_grad for parameter in self.parameters()):
            _checks.bad_value(
                "Distiller", "student", "have a parameter that learns (are student and teacher swapped?)", "none"
            )
        if isinstance(teacher, (Sequence, Mapping)) and not teacher:
            _checks.bad_value("Distiller", "teacher", "be None where there is none", teacher)
        if isinstance(student, DistributedDataParallel) and any(term.adapt is not None for term in self.terms):
            rule = "not be wrapped where adapters learn too: DistributedDataParallel(distiller)"
            _checks.bad_value("Distiller", "student", rule, type(student).__name__)

    def _models(self) -> dict[str, nn.Module]:
        """The teachers by what messages call them."""
        return {self._who(name): teacher.model for name, teacher in self.teachers.items()}

    def _who(self, name: str | None) -> str:
        return "the student" if name is None else "the teacher" if self._single else f"teacher {name!r}"

    def _make_captures(self) -> dict[str | None, Capture]:
        """Of the student, under None, and of every teacher."""
        wanted: dict[str | None, dict[str, None]] = {None: {}, **{name: {} for name in self.teachers}}
        for term in self.terms:
            wanted[None].update(dict.fromkeys(listed(term.student)))
            for path in self._taught_by(term):
                name, own = self._locate(path)
                wanted[name][own] = None
        models = {self._who(None): self.student, **self._models()}
        check_paths(models, {self._who(name): paths for name, paths in wanted.items()})
        return {name: Capture(models[self._who(name)], paths) for name, paths in wanted.items()}

    def _taught_by(self, term: Term) -> list[str]:
        if term.teacher == LOGITS:
            return [""] if self._single else [f"{name}/" for name in self.teachers]
        return list(listed(term.teacher))

    def _locate(self, path: str) -> tuple[str, str]:
        if not self.teachers:
            _checks.bad_value("Distiller", "teacher", "be given for a term that names one", None)
        if self._single:
            return next(iter(self.teachers)), path
        name, slash, own = path.partition("/")
        if not slash or name not in self.teachers:
            known = " or ".join(repr(f"{name}/") for name in self.teachers)
            _checks.bad_value("Distiller", "teacher", f"begin with {known}", repr(path))
        return name, own

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """An error if it holds a teacher's parameter, or lacks those of an adapter."""
        check_optimizer(optimizer, self, self._models())

    def attach(self) -> None:
        """Put the hooks in and leave them there, as ``torch.compile(distiller)`` needs it, which cannot trace that."""
        for capture in self._captures.values():
            capture.attach()

    def detach(self) -> None:
        """Remove the hooks that stay in compiled models."""
        for capture in self._captures.values():
            capture.detach()

    def set_progress(self, step: int, total: int) -> None:
        """Where training is, for schedules: at this step, counted from 0, of so many."""
        self._step = step, _checks.count("set_progress", "total", total)

    def _progress(self) -> tuple[int, int]:
        if self._step is None:
            if any(term.scheduled for term in self.terms):
                raise RuntimeError("Distiller: a term has a schedule; call set_progress(step, total) before each loss")
            return 0, 1
        return self._step

    def weights(self) -> dict[str, float]:
        """The weight that each term has now, by name."""
        return {term.name: term.weight_at(*self._progress()) for term in self.terms}

    def active(self) -> list[Term]:
        """The terms whose weight is not 0 now."""
        weights = self.weights()
        return [term for term in self.terms if weights[term.name]]

    def prepare(self, batch: Any) -> Distiller:
        """Make the adapters whose widths only a batch tells, before an optimizer or a state_dict needs them.

        The models run once, in evaluation mode and without gradients. Nothing is done where nothing is missing.
        """
        missing = self._missing()
        if missing:
            paths = [path for term in missing for path in self._taught_by(term)]
            taught = self._values_taught(batch, paths, None)
            with torch.no_grad(), frozen(self.student, "student"):
                student = self._learned(batch, missing)
            dtype = next((parameter.dtype for parameter in self.student.parameters()), None)
            for term in missing:
                values = self._pair(term, student, taught)
                self.adapters[term.key] = term.adapter_for(*values).to(dtype)
        return self

    def _missing(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term.adapt, str) and term.key not in self.adapters]

    def forward(self, batch: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`loss`"""
        return self.loss(batch, **options)

    def loss(
        self,
        batch: Any,
        *,
        normalizer: float | Tensor | Mapping[str, float | Tensor] | None = None,
        share: float | Tensor | Mapping[str, float | Tensor] | None = None,
        teacher_outputs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what it is made of.

        Args:
            batch: Inputs and labels; see ``inputs`` and ``labels``.
            normalizer: For gradient accumulation: the number of rows that count in all batches of the step. Losses with
                an argument of this name divide their sum by it, so that the losses of the batches add up to that of all
                rows at once. A dict gives one by the name of a term. DistributedDataParallel averages: pass the number
                over all ranks, divided by that of the ranks.
            share: What part of the step this batch is. Losses that take no normalizer are multiplied by it.
                A dict gives the factors of other terms too, by name.
            teacher_outputs: What :meth:`teach` returned for this batch: the teachers do not run.

        Returns:
            The weighted sum of the terms, 0-dim; and each term's own value before its weight, detached, by name. A term
            of weight 0 is not there.

        Raises:
            RuntimeError: an adapter is missing, as :meth:`prepare` was not called; ``set_progress`` was not called for
                a schedule; a value of the student has no gradient although it has parameters that learn.
            TypeError, ValueError: those of the losses, with the term's name.
        """
        if self._missing():
            names = ", ".join(term.name for term in self._missing())
            raise RuntimeError(
                f"Distiller: call prepare(batch) before the optimizer is made: no adapter yet for {names}"
            )
        terms, weights = self.active(), self.weights()
        now = self._now(batch)
        # First, so that the student's activations are not there yet while the teachers run.
        taught = self._values_taught(batch, [path for term in terms for path in self._taught_by(term)], teacher_outputs)
        student = self._learned(batch, terms)
        total, parts = None, {}
        for term in terms:
            value = term.compute(*self._adapted(term, student, taught), now.of(term, normalizer, share))
            parts[term.name] = value.detach()
            weighted = weights[term.name] * value
            total = weighted if total is None else total + weighted
        if total is None:
            total = torch.zeros((), device=next(self.parameters()).device, requires_grad=torch.is_grad_enabled())
        return total, parts

    def _now(self, batch: Any) -> Now:
        step, total = self._progress()
        return Now(batch, self._labels(batch), step, total)

    def _learned(self, batch: Any, terms: Iterable[Term]) -> Values:
        paths = dict.fromkeys(path for term in terms for path in listed(term.student))
        capture, inputs = self._captures[None], self._inputs(batch)
        values = capture.run(lambda: self._call(self.student, inputs), paths)
        if torch.is_grad_enabled():
            for path, value in values.items():
                learns(self.student, path, value)
        return values

    def teach(self, batch: Any, paths: Iterable[str] | None = None) -> Values:
        """The teachers' values by path, as terms write them: for other students, or for a cache.

        Args:
            batch: As for :meth:`loss`.
            paths: Which; by default :meth:`teacher_paths`.
        """
        by_teacher: dict[str, dict[str, str]] = {}
        for path in self.teacher_paths() if paths is None else paths:
            name, own = self._locate(path)
            by_teacher.setdefault(name, {})[own] = path
        values = {}
        for name, own_paths in by_teacher.items():
            capture = self._captures[name]
            unknown = [own for own in own_paths if own not in capture.paths]
            if unknown:
                capture = self._captures[name] = capture.and_also(unknown)
            given = self._teacher_inputs
            inputs = (given.get(name, self._inputs) if isinstance(given, Mapping) else given)(batch)
            got = self.teachers[name].run(self._call, inputs, capture, own_paths)
            values.update({path: got[own] for own, path in own_paths.items()})
        return values

    fit = fit

    def teacher_paths(self) -> list[str]:
        """What the terms whose weight is not 0 now ask of the teachers."""
        return list(dict.fromkeys(path for term in self.active() for path in self._taught_by(term)))

    def _values_taught(self, batch: Any, paths: Sequence[str], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if not paths:
            return {}
        known = self._cached(batch) if given is None else given
        if known is None:
            return self.teach(batch, dict.fromkeys(paths))
        missing = [path for path in paths if path not in known]
        if missing:
            rule = f"have the values of {', '.join(map(repr, missing))}"
            _checks.bad_value("Distiller", "teacher_outputs", rule, ", ".join(map(repr, known)))
        return known

    def _pair(self, term: Term, student: Values, taught: Mapping[str, Any]) -> tuple[Any, Any]:
        own = student[term.student] if isinstance(term.student, str) else [student[path] for path in term.student]
        paths = self._taught_by(term)
        single = isinstance(term.teacher, str) and len(paths) == 1
        return own, taught[paths[0]] if single else [taught[path] for path in paths]

    def _adapted(self, term: Term, student: Values, taught: Mapping[str, Any]) -> tuple[Any, Any]:
        own, other = self._pair(term, student, taught)
        return (self.adapters[term.key](own) if term.adapt is not None else own), other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for teacher in self.teachers.values():
            teacher.move(fn)
        return self


def _named(teacher: Any) -> dict[str, Any]:
    if isinstance(teacher, Mapping):
        for name in teacher:
            if not isinstance(name, str) or not name or "/" in name:
                _checks.bad_value("Distiller", "teacher", "have names without a slash", repr(name))
        return dict(teacher)
    if isinstance(teacher, Sequence):
        return {str(index): one for index, one in enumerate(teacher)}
    return {} if teacher is None else {"teacher": teacher}


def _as_teacher(given: Any) -> Teacher:
    return given if isinstance(given, Teacher) else Teacher(given)
