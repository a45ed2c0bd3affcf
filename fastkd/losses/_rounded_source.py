"""The source of a teacher's logits whose head is int8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import Head
from ..inputs._rounded import logits_of
from ._sources import Rows, _operand_dtype, take


class Rounded:
    """As :class:`Computed`, for a weight that is int8. Of ``Leading`` rows all are computed."""

    def __init__(self, head: Head, autocast: torch.dtype | None) -> None:
        self.head = head
        self.input = head.input.detach().reshape(-1, head.input.shape[-1])
        self.narrow = _operand_dtype(head, autocast)
        # Rounded rows are multiplied into memory of their own, which a chunk has until the next one has its own.
        self.bytes_per_row = (2 if head.round_input else 1) * head.shape[-1] * head.dtype.itemsize

    def prepare(self, chunk: int) -> None:
        self.buffer = None
        if not self.head.round_input:
            self.buffer = self.input.new_empty((chunk, self.head.shape[-1]), dtype=self.head.dtype)

    def logits(self, rows: Rows) -> Tensor:
        hidden = take(self.input, rows)
        out = None if self.buffer is None else self.buffer[: len(hidden)]
        return logits_of(self.head, hidden, self.narrow or self.head.dtype, out)
