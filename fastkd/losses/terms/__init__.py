"""Losses of rows that are made of several problems for the kernels: teachers that are sparse, mixed, or mapped.

Each term has the two functions that an implementation has (``_rows.py``), and so stands wherever one can::

    forward(rows)                            -> loss, state, scale
    backward(rows, state, scale, grad_loss)  -> grad

Its state begins with the same columns; what follows is its own.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..._rows import LogitRows


class Term(Protocol):
    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Any]: ...
    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor: ...
