"""A logit loss a few rows at a time, where some logits are computed and not stored: its value, and its gradients.

For each chunk of rows the sources hand out their logits, the kernels compute the loss of these rows and, over the
student's logits, their gradient, and the student's source turns that into gradients of its own tensors. So logits are
computed once, in forward, with all that follows from them: four matmuls for two heads. Backward multiplies what was
kept by the upstream gradient. Where that is one a row (``reduction="none"``), or was used up by an earlier backward
through the same graph, the logits are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch, _rows
from .._rows import LogitRows
from .._workspace import workspace
from ..inputs import Head, TopK
from ..inputs._checksum import agree, checksum
from . import _vocab_map
from ._arrangement import state_columns, term
from ._logit_arguments import Given
from ._rounded_source import Rounded
from ._sources import Computed, ComputedStudent, Leading, Rows, Spread, Stored, StoredStudent, put, take
from .terms.expected import past_the_logits
from .terms.weighing import number

DEVICE = 'Head(compact="device")'  # the operation that has the matmuls


class Chunks:
    """One call: the problem of all rows without its logits, and where these come from."""

    def __init__(
        self,
        rows: LogitRows,
        student: Tensor | Head,
        teachers: Sequence[Given],
        *,
        impl: str | None,
        dim: int,
        autocast: torch.dtype | None,
        vocab_map: Tensor | None = None,
        student_topk: int | None = None,
    ) -> None:
        self.rows, self.student, self.teachers = rows, student, tuple(teachers)
        self.op, self.impl, self.dim, self.device, self.autocast = rows.op, impl, dim, student.device, autocast
        shape = student.shape
        self.count = math.prod((*shape[:dim], *shape[dim + 1 :]))
        half = isinstance(student, Tensor) and student.dtype is torch.float16
        self.scaled = self.device.type == "cpu" and not half
        others = len(teachers) + len(rows.sparse) + len(rows.expected)
        self.adds = vocab_map is not None or others > 1  # gradients of several terms, each (rows, V)
        self.vocab_map, self.student_topk = vocab_map, student_topk
        self.pairs: Tensor | None = None

    def gradient_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of what ``release`` hands out, where it is wanted."""
        student = self.student
        if isinstance(student, Head):
            rows = (self.count, student.input.shape[-1])
            return [(rows, student.dtype), *((tuple(x.shape), student.dtype) for x in student.tensors()[1:])]
        return [((self.count, student.shape[self.dim]), student.dtype)]

    def _choose(self) -> None:
        """Who computes the chunks. Here, and not where the call is made: that may be a trace."""
        if self.vocab_map is not None:
            self.pairs = _vocab_map.pairs(self.op, self.vocab_map, self.student.shape[self.dim])
        like, *taught = (torch.empty(0, dtype=dtype, device=self.device) for dtype in self._dtypes())
        kind = {"pairs": self.pairs, "student_topk": self.student_topk}
        self.term = term(self.impl, like, taught, self.rows, **kind)

    def _dtypes(self) -> list[torch.dtype]:
        """Of the logits that the kernels see: the student's, then those of every teacher."""
        student = self.student.dtype
        if isinstance(self.student, Tensor) and self.adds and student is not torch.float64:
            student = torch.float32
        others = (*(x.log_probs for x in self.rows.sparse), *(x.mean for x in self.rows.expected))
        wide = [torch.float64 if x.dtype is torch.float64 else torch.float32 for x in others]
        return [student, *(x.dtype for x in self.teachers), *wide]

    def plan(self, wanted: Sequence[bool]) -> None:
        """Opens the sources and cuts the rows into chunks."""
        self._choose()
        student, matmuls = self.student, self._matmuls()
        self.source: StoredStudent | ComputedStudent
        if isinstance(student, Head):
            self.source = ComputedStudent(student, wanted, self.autocast, matmuls)
        else:
            self.source = StoredStudent(student, self.dim, wanted, self._dtypes()[0])
        self.taught = [self._taught(x, matmuls) for x in self.teachers]
        sources = [self.source, *self.taught]
        weight = _rows.weights(self.rows, self.count, torch.empty(0, device=self.device))
        for source in self.taught:
            if isinstance(source, Spread):
                source.counts = weight != 0
        self.divisor: float | Tensor = weight.sum() if self.rows.divisor is None else self.rows.divisor
        if isinstance(self.divisor, Tensor) and not self.divisor.is_cuda:
            self.divisor = float(self.divisor)
        self.chosen = self._compacted(weight != 0)
        active = self.count if self.chosen is None else len(self.chosen)
        bytes_per_row = sum(source.bytes_per_row for source in sources) + self._bytes_of_terms()
        if self.chosen is not None:  # rows that are picked are copied
            stored = [source.rows for source in sources if isinstance(source, Stored)]
            bytes_per_row += sum(rows.shape[1] * rows.element_size() for rows in stored)
        self.chunk = _chunk(active, bytes_per_row, self._workspace())
        for source in sources:
            source.prepare(min(self.chunk, active))
        self.leading: Tensor | None = None  # how many rows of each chunk count
        if matmuls is not None:
            ahead = torch.arange(0, active, self.chunk, device=self.device)
            self.leading = ((weight != 0).sum() - ahead).clamp(0, self.chunk)

    def _taught(self, given: Given, matmuls: Any) -> Computed | Rounded | Spread | Stored:
        if isinstance(given, Head):
            rounded = given.weight_scale is not None
            return Rounded(given, self.autocast) if rounded else Computed(given, self.autocast, matmuls)
        if isinstance(given, TopK):
            return Spread(given, self.rows.shared)
        assert isinstance(given, Tensor)
        return Stored(given, self.dim)

    def _bytes_of_terms(self) -> int:
        """A row of what the terms allocate: gradients to add up, and the pairs' logits."""
        size = self._dtypes()[0].itemsize
        total = 2 * self.source.vocabulary * size if self.adds else 0
        if self.pairs is not None:
            total += (2 + len(self.teachers)) * self.pairs.shape[1] * size
        return total

    def _workspace(self) -> int:
        given = [x.workspace for x in (self.student, *self.teachers) if isinstance(x, Head) and x.workspace is not None]
        return max(given) if given else workspace(self.device)

    def _compaction(self) -> str | bool:
        """Which rows the matmuls leave out: none, those that do not count (True), or the same without waiting."""
        heads = [x for x in (self.student, *self.teachers) if isinstance(x, Head)]
        chosen = [head.compact for head in heads if head.compact is not None]
        if "device" in chosen:
            return "device"
        return any(chosen) if chosen else self.device.type == "cpu"

    def _matmuls(self) -> Any:
        """Who multiplies rows of which the device alone knows how many count, if that is asked for."""
        if self._compaction() != "device":
            return None
        heads = [x for x in (self.student, *self.teachers) if isinstance(x, Head) and x.weight_scale is None]
        first, *others = [x for head in heads for x in head.tensors()]
        try:
            return _dispatch.pick(DEVICE, self.impl, first, others)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; compact=None and compact=True run anywhere") from None

    def _compacted(self, counts: Tensor) -> Tensor | None:
        """The numbers of the rows, those that count first or alone; None if all are computed as they stand."""
        way = self._compaction()
        if way is not True and isinstance(self.source, ComputedStudent):
            self.source.counts = counts.unsqueeze(1)
        if way == "device":
            return (~counts).to(torch.uint8).argsort(stable=True)
        if not way:
            return None
        numbers = counts.nonzero().squeeze(1)
        return None if len(numbers) == self.count else numbers

    def chunks(self) -> Iterator[tuple[Rows, LogitRows]]:
        active = self.count if self.chosen is None else len(self.chosen)
        for i, begin in enumerate(range(0, active, self.chunk)):
            part = slice(begin, min(begin + self.chunk, active))
            rows: Rows = part if self.chosen is None else self.chosen[part]
            if self.leading is not None and isinstance(rows, Tensor):
                rows = Leading(rows, self.leading[i])
            logits = self.source.logits(rows)
            taught = tuple(source.logits(rows) for source in self.taught)
            problem = _rows.of_rows(self.rows, lambda numbers: take(numbers, rows), logits, taught)  # noqa: B023
            problem.divisor, problem.overwrite = self.divisor, self.source.overwrite
            if problem.expected:
                assert isinstance(self.source, ComputedStudent)  # the arguments were checked for that
                problem.hidden = self.source.scaled_hidden(rows)
            yield rows, problem

    def forward(self, wanted: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Loss and state. The gradients of a reduced loss wait in ``source``, for an upstream gradient of 1 / scale."""
        if self.device.type == "cpu":
            _checks.row_data(self.rows, self.student.shape[self.dim])
        self._check_weights()
        self.plan(wanted)
        empty = torch.empty((), dtype=torch.float64, device=self.device)
        columns = state_columns(self.rows, len(self.teachers), self.student_topk, self.vocab_map is not None)
        state = empty.new_zeros((self.count, columns))
        losses = empty.new_zeros(() if self.rows.reduce else self.count)
        one = empty.new_ones((), dtype=dtype)
        for rows, problem in self.chunks():
            loss, part, _ = self.term.forward(problem)
            put(state, rows, part)
            if self.rows.reduce:
                losses += loss
                if any(wanted):
                    self._add(rows, problem, part, self._inside(), one)
            else:
                put(losses, rows, loss)
        del self.rows.student, self.rows.teachers  # the caller's: autograd keeps their tensors, and lets them go
        return losses.to(dtype), state

    def again(self, wanted: Sequence[bool], state: Tensor, grad_loss: Tensor) -> None:
        """The gradients once more, with the upstream gradient in them."""
        self.plan(wanted)
        for rows, problem in self.chunks():
            upstream = grad_loss if self.rows.reduce else take(grad_loss, rows)
            self._add(rows, problem, take(state, rows), self.scale() if self.rows.reduce else self._one(), upstream)

    def release(self) -> list[Tensor | None]:
        """The gradients; everything else is let go."""
        gradients = self.source.gradients
        del self.source, self.taught, self.student, self.teachers
        return gradients

    def _add(self, rows: Rows, problem: LogitRows, state: Tensor, scale: Tensor, upstream: Tensor) -> None:
        past = past_the_logits(problem, state, scale, upstream) if problem.expected else None
        gradient = self.term.backward(problem, state, scale, upstream)
        unit = (state[:, _rows.WEIGHT] * upstream * (scale if self.rows.reduce else 1)).abs()
        self.source.add(rows, problem.student, gradient, unit)
        if past is not None:
            assert isinstance(self.source, ComputedStudent)
            self.source.add_to_input(rows, past)

    def _check_weights(self) -> None:
        """That a teacher's expected embedding is under these weights."""
        for teacher in self.rows.expected:
            assert isinstance(self.student, Head)
            if teacher.checksum is not None and not agree(
                teacher.checksum, checksum(self.student.weight, self.student.bias)
            ):
                rule = "be the head that the Expected teacher was made with"
                _checks.bad_value(self.op, "student", rule, "other weights")

    def scale(self) -> Tensor:
        """1 / divisor, or 0 where nothing counts."""
        divisor = number(self.divisor, torch.empty(0, device=self.device))
        return torch.where(divisor == 0, 0.0, 1 / divisor)

    def _one(self) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=self.device)

    def _inside(self) -> Tensor:
        """The part of the scale that is in the kept gradients.

        On a CPU all of it: nothing remains to be done where the upstream gradient is 1. On a GPU, where gradients are
        rounded to 16 bits on their way, and for float16 logits nothing: those of a mean over many rows would be lost.
        """
        return self.scale() if self.scaled else self._one()

    def outside(self) -> Tensor:
        return self._one() if self.scaled else self.scale()


def _chunk(rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows at a time: as many as the budget allows, evenly."""
    most = max(1, min(rows, budget // bytes_per_row)) if bytes_per_row else max(1, rows)
    chunks = -(-max(rows, 1) // most)
    return -(-max(rows, 1) // chunks)
