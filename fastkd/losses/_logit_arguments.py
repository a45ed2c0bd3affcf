"""From a user's arguments to the rows of :class:`fastkd._rows.LogitRows`: every check and default, no computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._rows import LogitRows
from ..inputs import Expected, Head, TopK
from . import _vocab_map

REDUCTIONS = ("none", "sum", "mean", "batchmean")
BETA = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}  # the divergences that take beta, and their defaults
UNSKEWED = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}  # what they are at beta = 0
TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
PLAIN = (torch.Tensor, torch.nn.Parameter)
ONE_LOGITS = "a tensor of logits or a Head"
SEVERAL_LOGITS = "a tensor of logits, a Head, a TopK or an Expected, or a sequence of them"
KINDS = (Tensor, Head, TopK, Expected)

Given = Tensor | Head | TopK | Expected


def tensors_of(given: Given) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else given.tensors()


class Logits:
    """The logits of one call, checked, and the layout that every per-row argument has to fit."""

    __slots__ = (
        *("anchor", "computed", "constants", "count", "dim", "dtype", "op"),
        *("cut", "plain", "shape", "shared", "student", "teachers", "vocab_map", "vocabulary"),
    )

    def __init__(
        self,
        op: str,
        student: Tensor | Head,
        teacher: Any,
        dim: int,
        shared_vocab: int | None = None,
        mapping: Tensor | None = None,
    ) -> None:
        self.computed = isinstance(student, Head)  # a few rows at a time, since some logits are still to be computed
        self.anchor: Tensor = student.input if isinstance(student, Head) else student  # where the student is
        if not isinstance(student, Head):
            _checks.logits(op, "student", student, ONE_LOGITS)
        elif student.weight_scale is not None:
            rule = "have a float weight: an int8 one gets no gradient (prepare_qat_ trains with rounded numbers)"
            _checks.bad_type(op, "student", rule, student.weight.dtype)
        self.op, self.student = op, student
        self.constants: list[Tensor] = []
        shape = student.shape
        self.dim = _checks.dimension(op, dim, len(shape))
        last = self.dim == len(shape) - 1
        self.shape = shape[:-1] if last else shape[: self.dim] + shape[self.dim + 1 :]
        self.count = math.prod(self.shape)
        self.teachers: tuple[Given, ...] = (teacher,) if isinstance(teacher, KINDS) else self._sequence(teacher)
        self.plain = True  # every teacher has logits
        self.vocab_map: Tensor | None = None
        self.dtype = torch.float64 if student.dtype is torch.float64 else torch.float32
        self.vocabulary = vocabulary = shape[self.dim]
        if vocabulary == 0:
            _checks.bad_value(op, "student", "have at least one class", f"shape {tuple(shape)}")
        self.shared = vocabulary
        self.cut = shared_vocab is not None  # a teacher may know ids that the student does not
        if mapping is not None:
            self._map(mapping, shared_vocab)
        for tensor in self.teachers:
            self._check_teacher(tensor, shared_vocab)
        if shared_vocab is not None:
            self._share(shared_vocab)
        if not last and any(isinstance(one, Head) for one in (student, *self.teachers)):
            _checks.bad_value(op, "dim", "be the last one with a Head", dim)

    def _sequence(self, teacher: Any) -> tuple[Given, ...]:
        if not isinstance(teacher, (list, tuple)):
            _checks.bad_type(self.op, "teacher", f"be {SEVERAL_LOGITS}", type(teacher).__name__)
        if not teacher and self.op == "kd_loss":
            _checks.bad_value(self.op, "teacher", "hold at least one tensor", "an empty sequence")
        return tuple(teacher)

    def _map(self, mapping: Tensor, shared_vocab: int | None) -> None:
        if shared_vocab is not None:
            _checks.bad_value(self.op, "shared_vocab", "be None with vocab_map", shared_vocab)
        _vocab_map.check(self.op, mapping, self.anchor.device)
        self.vocab_map = self.constant(mapping)
        self.computed = True

    def _check_teacher(self, teacher: Any, shared_vocab: int | None) -> None:
        if not isinstance(teacher, (Head, TopK, Expected)):
            _checks.logits(self.op, "teacher", teacher, SEVERAL_LOGITS)
        _checks.same_device(self.op, "teacher", teacher, self.anchor)
        if teacher.dtype is torch.float64:
            self.dtype = torch.float64
        if isinstance(teacher, (TopK, Expected)):
            self.plain = False
            shape = (teacher.indices if isinstance(teacher, TopK) else teacher.mean).shape[:-1]
            if shape != self.shape:
                _checks.bad_value(self.op, "teacher", f"have the student's rows, {tuple(self.shape)}", tuple(shape))
            return
        if isinstance(teacher, Head):
            self.computed = True
        if teacher.shape != self.student.shape or self.vocab_map is not None:
            self._check_shape(tuple(teacher.shape), shared_vocab)

    def _check_shape(self, shape: tuple[int, ...], shared_vocab: int | None) -> None:
        """Of a teacher's logits: the student's, but for the vocabulary where that is spoken for."""
        op, student, dim = self.op, self.student, self.dim
        expected = list(student.shape)
        if len(shape) == len(expected):
            expected[dim] = shape[dim]
        if list(shape) != expected:
            _checks.bad_value(op, "teacher", f"have the student's shape, {tuple(student.shape)}", shape)
        if self.vocab_map is not None:
            if shape[dim] != len(self.vocab_map):
                rule = f"have the vocabulary that vocab_map is of, {len(self.vocab_map)}"
                _checks.bad_value(op, "teacher", rule, shape[dim])
        elif shared_vocab is None:
            sizes = f"{shape[dim]} for a student of {student.shape[dim]}"
            rule = "have the student's vocabulary, unless shared_vocab or vocab_map is given"
            _checks.bad_value(op, "teacher", rule, sizes)

    def _share(self, shared_vocab: int) -> None:
        whole = [x for x in (self.student, *self.teachers) if isinstance(x, (Tensor, Head))]
        smallest = min(x.shape[self.dim] for x in whole)
        if isinstance(shared_vocab, bool) or not isinstance(shared_vocab, int):
            _checks.bad_type(self.op, "shared_vocab", "be an integer", type(shared_vocab).__name__)
        if not 1 <= shared_vocab <= smallest:
            _checks.bad_value(
                self.op, "shared_vocab", f"be from 1 to {smallest}, the smallest vocabulary", shared_vocab
            )
        self.shared = shared_vocab

    def number(self, argument: str, value: Any, check: Callable[[str, str, Any], float]) -> float | Tensor:
        """A number that may vary by row."""
        if isinstance(value, Tensor):
            return self.by_row(argument, value)
        return check(self.op, argument, value)

    def by_row(self, argument: str, value: Any) -> Tensor:
        rows = _checks.row_tensor(self.op, argument, value, self.anchor, self.shape, self.count, self.dtype)
        return self.constant(rows)

    def constant(self, tensor: Tensor) -> Tensor:
        """Remembers a tensor that backward will read again."""
        self.constants.append(tensor)
        return tensor

    def teacher_temperature(self, value: Any, student: float | Tensor) -> tuple[float | Tensor, ...]:
        teachers = len(self.teachers)
        if value is None:
            return (student,) * teachers
        if not isinstance(value, (list, tuple)):
            return (self.number("teacher_temperature", value, _checks.positive),) * teachers
        if len(value) != teachers:
            _checks.bad_value(self.op, "teacher_temperature", f"hold one number per teacher, {teachers}", len(value))
        return tuple(self.number("teacher_temperature", one, _checks.positive) for one in value)

    def teacher_weight(self, value: Any) -> tuple[float, ...] | Tensor:
        teachers = len(self.teachers)
        if value is None:
            return (1.0 / teachers,) * teachers if teachers else ()
        if isinstance(value, Tensor):
            _checks.constant(self.op, "teacher_weight", value)
            _checks.same_device(self.op, "teacher_weight", value, self.anchor)
            if value.shape != (teachers,) and value.shape != (*self.shape, teachers):
                rule = f"have shape {(teachers,)} or {(*self.shape, teachers)}"
                _checks.bad_value(self.op, "teacher_weight", rule, tuple(value.shape))
            weights = self.constant(value.detach().to(self.dtype))
            return weights.expand(self.count, teachers) if value.ndim == 1 else weights.reshape(-1, teachers)
        if not isinstance(value, (list, tuple)) or len(value) != teachers:
            _checks.bad_value(self.op, "teacher_weight", f"hold one number per teacher, {teachers}", value)
        return tuple(_checks.finite(self.op, "teacher_weight", one) for one in value)

    def divisor(self, reduction: str, normalizer: Any) -> float | Tensor | None:
        """What the sum is divided by; None for the sum of the weights of the rows that count."""
        _checks.choice(self.op, "reduction", reduction, REDUCTIONS)
        if normalizer is not None:
            if reduction == "none":
                _checks.bad_value(self.op, "normalizer", 'be None with reduction="none"', normalizer)
            if not isinstance(normalizer, Tensor):
                return self._count(_checks.not_negative(self.op, "normalizer", normalizer))
            _checks.constant(self.op, "normalizer", normalizer)
            _checks.same_device(self.op, "normalizer", normalizer, self.anchor)
            if normalizer.ndim:
                _checks.bad_value(
                    self.op, "normalizer", "be a number or a 0-dim tensor", f"shape {tuple(normalizer.shape)}"
                )
            return normalizer.detach().to(self.dtype)
        if reduction == "batchmean":
            if self.dim == 0:
                _checks.bad_value(self.op, "student", 'have a batch dimension for reduction="batchmean"', "dim=0")
            return self._count(float(self.student.shape[0]))
        return None if reduction == "mean" else 1.0

    def _count(self, number: float) -> float | Tensor:
        """A number that follows the batch; as a number in a graph it would ask for a graph of its own each time."""
        return self.anchor.new_full((), number, dtype=self.dtype) if torch.compiler.is_compiling() else number

    def lie_in_memory(self) -> bool:
        """Whether all values can be read where the tensors point.

        Not those of a fake, distributed or wrapping tensor, those under a mode that looks at operators, and those with
        a lazy minus sign.
        """
        for tensor in (*self.tensors(), *self.constants):
            if type(tensor) not in PLAIN or tensor.is_neg():
                return False
        if torch._C._len_torch_dispatch_stack() == 0:
            return True
        # What is made of operators is run, so that a mode that counts them sees them, unless it records or fakes.
        tracers = (torch._C._get_dispatch_mode(key) for key in TRACERS)
        return (self.computed or not self.plain) and all(mode is None for mode in tracers)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the student and the teachers consist of."""
        return tuple(x for one in (self.student, *self.teachers) for x in tensors_of(one))

    def best_of_student(self, k: Any, divergence: str) -> int | None:
        if k is None:
            return None
        _checks.count(self.op, "student_topk", k)
        if divergence != "reverse_kl":
            _checks.bad_value(self.op, "student_topk", "be None but for reverse_kl", divergence)
        if not self.plain:
            _checks.bad_value(self.op, "student_topk", "be None unless every teacher has logits", k)
        most = self.shared if self.vocab_map is None else min(self.shared, len(self.vocab_map))
        if k > most:
            _checks.bad_value(self.op, "student_topk", f"be at most {most}, the shared vocabulary", k)
        self.computed = True
        return int(k)

    def standardized(self, value: Any, divergence: str, student_topk: int | None) -> bool:
        if not value:
            return False
        op, pairs = self.op, self.shared if self.vocab_map is None else min(self.shared, len(self.vocab_map))
        if divergence == "mse":
            _checks.bad_value(op, "standardize", "be False for mse, which compares raw logits", value)
        if not self.plain:
            _checks.bad_value(op, "standardize", "be False unless every teacher has logits", value)
        if student_topk is not None:
            _checks.bad_value(op, "standardize", "be False with student_topk", value)
        if pairs < 2:
            _checks.bad_value(op, "standardize", "be False for one class, which has no standard deviation", value)
        return True

    def may_overwrite(self) -> bool:
        if isinstance(self.student, Head):
            return False  # its logits never were the caller's
        student, base = self.student, self.student._base
        if torch.compiler.is_compiling() or not (student.requires_grad and torch.is_grad_enabled()):
            return False
        if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
            rule = "be False for a leaf or a view of one (the gradient would destroy the parameter)"
            _checks.bad_value(self.op, "overwrite_student", rule, True)
        if not (student if self.dim == student.ndim - 1 else student.movedim(self.dim, -1)).is_contiguous():
            _checks.bad_value(self.op, "overwrite_student", "be False unless the student is contiguous", True)
        storage = student.untyped_storage().data_ptr()
        others = (*self.tensors()[1:], *self.constants)
        if storage and any(tensor.untyped_storage().data_ptr() == storage for tensor in others):
            rule = "be False where another argument shares the student's memory"
            _checks.bad_value(self.op, "overwrite_student", rule, True)
        # Hooks hand back what they like, and autograd then compares no versions: nobody would notice the overwriting.
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is None

    def rows(
        self,
        target: Tensor | None,
        *,
        row_weight: Tensor | None,
        label_smoothing: float,
        z_loss: float,
        ignore_index: int,
        reduction: str,
        normalizer: float | Tensor | None,
        overwrite: bool,
        **soft: Any,
    ) -> LogitRows:
        op = self.op
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            _checks.bad_type(op, "ignore_index", "be an integer", type(ignore_index).__name__)
        if not -(2**63) <= ignore_index < 2**63:
            _checks.bad_value(op, "ignore_index", "fit in 64 bits", ignore_index)
        return LogitRows(
            student=self.student,  # type: ignore[arg-type]  # in its own layout still: LogitLoss saves that one
            teachers=self.teachers,  # type: ignore[arg-type]
            target=None if target is None else self.constant(_checks.target(op, target, self.anchor, self.shape)),
            row_weight=None if row_weight is None else self.by_row("row_weight", row_weight),
            divisor=self.divisor(reduction, normalizer),
            label_smoothing=_checks.fraction(op, "label_smoothing", label_smoothing),
            z_loss=_checks.not_negative(op, "z_loss", z_loss),
            ignore_index=ignore_index,
            shared=self.shared,
            reduce=reduction != "none",
            op=op,
            overwrite=overwrite and self.may_overwrite(),
            **soft,
        )


def divergence_and_beta(op: str, divergence: str, beta: float | None) -> tuple[str, float]:
    """skew_* at beta 0 are the plain divergences, with their own rules where the mathematics is infinite."""
    if divergence not in BETA:
        if beta is not None:
            _checks.bad_value(op, "beta", f"be None for {divergence} (only {', '.join(BETA)} take it)", beta)
        return divergence, 0.0
    if beta is None:
        return divergence, BETA[divergence]
    beta = _checks.finite(op, "beta", beta)
    if divergence == "jsd" and not 0 < beta < 1:
        rule = 'be between 0 and 1 for jsd (its ends are 0 everywhere: divergence="forward_kl" or "reverse_kl")'
        _checks.bad_value(op, "beta", rule, beta)
    if not 0 <= beta < 1:
        _checks.bad_value(op, "beta", f"be from 0 to below 1 for {divergence}", beta)
    return (UNSKEWED[divergence], 0.0) if beta == 0 else (divergence, beta)
