"""A logit loss a few rows at a time, where some logits are computed and not stored: its value, and its gradients.

For each chunk of rows the sources hand out their logits, the kernels compute the loss of these rows and, over the
student's logits, their gradient, and the student's source turns that into gradients of its own tensors. So logits are
computed once, in forward, with all that follows from them: four matmuls for two heads. Backward multiplies what was
kept by the upstream gradient. Where that is one a row (``reduction="none"``), or was used up by an earlier backward
through the same graph, the logits are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _rows
from .._rows import LogitRows
from .._workspace import workspace
from ..inputs import Head
from ._logit_arguments import Given
from ._sources import Computed, ComputedStudent, Rows, Stored, StoredStudent, put, take


class Chunks:
    """One call: the problem of all rows without its logits, and where these come from."""

    def __init__(
        self,
        rows: LogitRows,
        student: Given,
        teachers: Sequence[Given],
        dim: int,
        count: int,
        implementation: Any,
    ) -> None:
        self.rows, self.student, self.teachers = rows, student, tuple(teachers)
        self.dim, self.count, self.implementation = dim, count, implementation
        self.device = student.device

    def plan(self, wanted: Sequence[bool]) -> None:
        """Opens the sources and cuts the rows into chunks."""
        student = self.student
        self.source: StoredStudent | ComputedStudent = (
            ComputedStudent(student, wanted) if isinstance(student, Head) else StoredStudent(student, self.dim, wanted)
        )
        self.taught = [Computed(x) if isinstance(x, Head) else Stored(x, self.dim) for x in self.teachers]
        sources = [self.source, *self.taught]
        weight = _rows.weights(self.rows, self.count, student.input if isinstance(student, Head) else student)
        self.divisor: float | Tensor = weight.sum() if self.rows.divisor is None else self.rows.divisor
        if isinstance(self.divisor, Tensor) and not self.divisor.is_cuda:
            self.divisor = float(self.divisor)
        self.chosen = self._compacted(weight != 0)
        active = self.count if self.chosen is None else len(self.chosen)
        self.chunk = _chunk(active, sum(source.bytes_per_row for source in sources), self._workspace())
        for source in sources:
            source.prepare(min(self.chunk, active))

    def _workspace(self) -> int:
        given = [x.workspace for x in (self.student, *self.teachers) if isinstance(x, Head) and x.workspace is not None]
        return max(given) if given else workspace(self.device)

    def _compacted(self, counts: Tensor) -> Tensor | None:
        """The numbers of the rows that count, if the others are left out."""
        heads = [x for x in (self.student, *self.teachers) if isinstance(x, Head)]
        chosen = [head.compact for head in heads if head.compact is not None]
        if not (any(chosen) if chosen else self.device.type == "cpu"):
            if isinstance(self.source, ComputedStudent):
                self.source.counts = counts.unsqueeze(1)
            return None
        numbers = counts.nonzero().squeeze(1)
        return None if len(numbers) == self.count else numbers

    def chunks(self) -> Iterator[tuple[Rows, LogitRows]]:
        active = self.count if self.chosen is None else len(self.chosen)
        for begin in range(0, active, self.chunk):
            part = slice(begin, min(begin + self.chunk, active))
            rows: Rows = part if self.chosen is None else self.chosen[part]
            logits = self.source.logits(rows)
            taught = tuple(source.logits(rows) for source in self.taught)
            problem = _rows.of_rows(self.rows, lambda numbers: take(numbers, rows), logits, taught)  # noqa: B023
            problem.divisor, problem.overwrite = self.divisor, self.source.overwrite
            yield rows, problem

    def forward(self, wanted: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Loss and state. The gradients of a reduced loss wait in ``source``, for an upstream gradient of 1 / scale."""
        self.plan(wanted)
        empty = torch.empty((), dtype=torch.float64, device=self.device)
        state = empty.new_zeros((self.count, _rows.state_width(len(self.teachers))))
        losses = empty.new_zeros(() if self.rows.reduce else self.count)
        one = empty.new_ones((), dtype=dtype)
        for rows, problem in self.chunks():
            loss, part, _ = self.implementation.forward(problem)
            put(state, rows, part)
            if self.rows.reduce:
                losses += loss
                if any(wanted):
                    self._add(rows, problem, part, self._inside(), one)
            else:
                put(losses, rows, loss)
        return losses.to(dtype), state

    def again(self, wanted: Sequence[bool], state: Tensor, grad_loss: Tensor) -> None:
        """The gradients once more, with the upstream gradient in them."""
        self.plan(wanted)
        for rows, problem in self.chunks():
            upstream = grad_loss if self.rows.reduce else take(grad_loss, rows)
            self._add(rows, problem, take(state, rows), self.scale() if self.rows.reduce else self._one(), upstream)

    def release(self) -> list[Tensor | None]:
        """The gradients; everything else is let go."""
        gradients = self.source.finish()
        del self.source, self.taught, self.student, self.teachers
        return gradients

    def _add(self, rows: Rows, problem: LogitRows, state: Tensor, scale: Tensor, upstream: Tensor) -> None:
        gradient = self.implementation.backward(problem, state, scale, upstream)
        self.source.add(rows, problem.student, gradient)

    def scale(self) -> Tensor:
        """1 / divisor, or 0 where nothing counts."""
        divisor = torch.as_tensor(self.divisor, dtype=torch.float64, device=self.device)
        return torch.where(divisor == 0, 0.0, 1 / divisor)

    def _one(self) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=self.device)

    def _inside(self) -> Tensor:
        """The part of the scale that is in the kept gradients.

        On a CPU all of it: nothing remains to be done where the upstream gradient is 1. On a GPU nothing: gradients are
        rounded to 16 bits on their way, and those of a mean over many rows would be lost in float16.
        """
        return self.scale() if self.device.type == "cpu" else self._one()

    def outside(self) -> Tensor:
        return self._one() if self.device.type == "cpu" else self.scale()


def _chunk(rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows at a time: as many as the budget allows, evenly."""
    most = max(1, min(rows, budget // bytes_per_row)) if bytes_per_row else max(1, rows)
    chunks = -(-max(rows, 1) // most)
    return -(-max(rows, 1) // chunks)
