"""Where the logits of some rows come from: a tensor that holds them, or a head that computes them when asked.

A source hands out the logits of the rows it is asked for, ``(rows, V)``. The student's also takes the gradient of these
logits, and adds up what that makes of its tensors' gradients. Rows are a slice, a tensor of their numbers, or
:class:`Leading`. Matmuls are torch's, but for those of ``Leading`` rows; they run with autocast off, in the dtypes that
stand here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._topk_rows import refuse_wrong_ids, wrong_ids
from ..inputs import Head, TopK
from ._filter import ROWS, kept
from ._logit_autograd import flatten

SLAB = 16 * 2**20  # bytes of a weight that is widened at a time


@dataclass(frozen=True, eq=False)
class Leading:
    """Rows of which only the first ones count, and how many: a number that the device alone knows.

    No matmul touches the others. Their logits are what was in the buffer, maybe NaN; their gradients are 0.
    """

    numbers: Tensor
    count: Tensor  # 0-dim


Rows = slice | Tensor | Leading


def take(tensor: Tensor, rows: Rows) -> Tensor:
    if isinstance(rows, slice):
        return tensor[rows]
    return tensor.index_select(0, rows.numbers if isinstance(rows, Leading) else rows)


def put(target: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] = values
    else:
        target.index_copy_(0, rows.numbers if isinstance(rows, Leading) else rows, values.to(target.dtype))


class Stored:
    """Logits that exist."""

    bytes_per_row = 0  # of workspace

    def __init__(self, logits: Tensor, dim: int) -> None:
        self.rows = flatten(logits.detach(), dim)
        self.vocabulary = self.rows.shape[1]

    def prepare(self, chunk: int) -> None:
        pass

    def logits(self, rows: Rows) -> Tensor:
        return take(self.rows, rows)


class Spread:
    """Log-probabilities of a teacher known by k ids: the rest of its probability evenly on all others."""

    def __init__(self, teacher: TopK, vocabulary: int) -> None:
        wide = torch.float64 if teacher.dtype is torch.float64 else torch.float32
        self.indices = teacher.indices.detach().reshape(-1, teacher.k).long()
        self.log_probs = teacher.log_probs.detach().reshape(-1, teacher.k).to(wide)
        self.vocabulary = vocabulary
        self.bytes_per_row = vocabulary * wide.itemsize
        self.counts: Tensor  # (N,): in the other rows any id may stand

    def prepare(self, chunk: int) -> None:
        self.buffer = self.log_probs.new_empty((chunk, self.vocabulary + 1))

    def logits(self, rows: Rows) -> Tensor:
        indices, log_probs = take(self.indices, rows), take(self.log_probs, rows)
        wrong = wrong_ids(indices, self.vocabulary).any(1, keepdim=True)
        if not indices.is_cuda:
            refuse_wrong_ids(indices[take(self.counts, rows)], self.vocabulary)
        known = (indices >= 0) & (indices < self.vocabulary)
        others = self.vocabulary - known.sum(1, keepdim=True)
        rest = (1 - torch.where(known, log_probs.double().exp(), 0.0).sum(1, keepdim=True)).clamp(min=0)
        each = torch.where(others == 0, 0.0, rest / others).log().to(log_probs.dtype)
        out = self.buffer[: len(indices)]
        out.copy_(torch.where(wrong, torch.nan, each).expand_as(out))
        # What is no id goes into a column beyond the last.
        place = torch.where(known, indices, self.vocabulary)
        return out.scatter_(1, place, torch.where(wrong, torch.nan, log_probs))[:, : self.vocabulary]


class Computed:
    """A head. Its logits are written into one buffer again and again. ``matmuls``: those of ``Leading`` rows."""

    def __init__(self, head: Head, autocast: torch.dtype | None, matmuls: Any = None) -> None:
        self.head, self.dtype, self.matmuls = head, head.dtype, matmuls
        self.input = head.input.detach().reshape(-1, head.input.shape[-1])
        self.weight = head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach()
        self.vocabulary = len(self.weight)
        self.narrow = _operand_dtype(head, autocast)
        self.bytes_per_row = self.vocabulary * self.dtype.itemsize

    def prepare(self, chunk: int) -> None:
        """Allocates for so many rows at a time."""
        self.buffer = self._empty(chunk, self.dtype)
        if self.narrow is not None:
            self.weight = self.weight.to(self.narrow)  # itself, unless autocast asks for another dtype

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, V). Those that ``matmuls`` take begin at multiples of 16 bytes: such rows are read faster."""
        more = 0 if self.matmuls is None else -self.vocabulary % (16 // dtype.itemsize)
        return self.input.new_empty((rows, self.vocabulary + more), dtype=dtype)[:, : self.vocabulary]

    def operand(self, rows: Rows) -> Tensor:
        hidden = take(self.input, rows)
        if isinstance(rows, Leading) and self.narrow is None:
            return hidden  # the matmul itself widens what has to be wide
        return hidden.to(self.narrow or self.dtype)

    def logits(self, rows: Rows) -> Tensor:
        head, hidden = self.head, self.operand(rows)
        out = self.buffer[: len(hidden)]
        if isinstance(rows, Leading):
            self.matmuls.multiply(hidden, self.weight.t(), rows.count, out, bias=self.bias, scale=head.scale)
        elif self.narrow is not None:
            torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=out)
            if self.bias is not None:
                out.add_(self.bias)
            if head.scale != 1:
                out.mul_(head.scale)
        else:
            for ids, slab in self.slabs([slice(0, self.vocabulary)]):
                part = out[:, ids]
                if self.bias is None:
                    torch.addmm(part, hidden, slab.t(), beta=0, alpha=head.scale, out=part)
                else:
                    bias = self.bias[ids].to(self.dtype)
                    torch.addmm(bias, hidden, slab.t(), beta=head.scale, alpha=head.scale, out=part)
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out

    def slabs(self, ranges: Sequence[slice]) -> Iterator[tuple[slice, Tensor]]:
        """These ids of the weight in the logits' dtype, in parts where that is not its own."""
        step = self.vocabulary
        if self.weight.dtype is not self.dtype:
            step = max(1, SLAB // (self.weight.shape[1] * self.dtype.itemsize or 1))
        for wide in ranges:
            for begin in range(wide.start, wide.stop, step):
                ids = slice(begin, min(begin + step, wide.stop))
                yield ids, self.weight[ids].to(self.dtype)


class StoredStudent(Stored):
    """The student's logits, and their gradient."""

    overwrite = False

    def __init__(self, logits: Tensor, dim: int, wanted: Sequence[bool], dtype: torch.dtype) -> None:
        super().__init__(logits, dim)
        self.dtype = dtype  # in which a chunk is handed out
        copies = int(dtype is not logits.dtype) + int(wanted[0])  # of the logits, and the gradient
        self.bytes_per_row = copies * self.vocabulary * dtype.itemsize
        self.gradients: list[Tensor | None] = [torch.zeros_like(self.rows) if wanted[0] else None]

    def logits(self, rows: Rows) -> Tensor:
        return take(self.rows, rows).to(self.dtype)

    def add(self, rows: Rows, logits: Tensor, gradient: Tensor, unit: Tensor) -> None:
        (total,) = self.gradients
        assert total is not None
        put(total, rows, gradient)


class ComputedStudent(Computed):
    """The student's head, and the gradients of its tensors: float32 or wider until the last chunk."""

    def __init__(self, head: Head, wanted: Sequence[bool], autocast: torch.dtype | None, matmuls: Any = None) -> None:
        super().__init__(head, autocast, matmuls)
        self.overwrite = head.softcap is None  # its slope needs the logits
        self.rounded = None if head.grad_precision == "float32" else self.narrow  # of the gradient, before its matmuls
        if any(wanted):
            logits = self.bytes_per_row
            self.bytes_per_row += 0 if self.overwrite else logits
            self.bytes_per_row += 0 if self.rounded is None else self.vocabulary * self.rounded.itemsize
        self.fresh = head.filter_eps == 0  # the first matmul need not read what it adds to
        self.counts: Tensor | None = None  # (N, 1): which rows count, where the others are computed too
        self.gradients: list[Tensor | None] = [
            torch.zeros(x.shape, dtype=self.dtype, device=x.device) if want else None
            for x, want in zip((self.input, *head.tensors()[1:]), wanted, strict=True)
        ]

    def scaled_hidden(self, rows: Rows) -> Tensor:
        return take(self.input, rows).to(self.dtype) * self.head.scale

    def add_to_input(self, rows: Rows, gradient: Tensor) -> None:
        """``gradient`` is that of the hidden states times scale."""
        of_input = self.gradients[0]
        if of_input is not None:
            put(of_input, rows, take(of_input, rows) + self.head.scale * gradient.to(self.dtype))

    def add(self, rows: Rows, logits: Tensor, gradient: Tensor, unit: Tensor) -> None:
        """``gradient`` is that of the logits of these rows, and is used up. ``unit``: see ``_filter.py``."""
        head = self.head
        if head.softcap is not None:  # d tanh = 1 - tanh^2
            squares = logits.square_()
            if self.counts is not None:  # a dropped row may hold NaN, and NaN * 0 is not 0
                squares.masked_fill_(~take(self.counts, rows), 0)
            gradient.addcmul_(gradient, squares, value=-1 / head.softcap**2)
        of_input, of_weight, *of_bias = self.gradients
        if of_bias and of_bias[0] is not None:
            of_bias[0].add_(gradient.sum(0), alpha=head.scale)
        if isinstance(rows, Leading):
            self._add_leading(rows, gradient)
            return
        blocks = self._blocks(gradient, unit)
        if self.rounded is not None:
            gradient = gradient.to(self.rounded)
        if of_input is not None:
            parts = [self._times_weight(gradient[block], ranges) for block, ranges in blocks]
            put(of_input, rows, parts[0] if len(parts) == 1 else torch.cat(parts))
        if of_weight is not None:
            hidden = take(self.input, rows).to(self.rounded or self.dtype)
            if self.counts is not None:
                hidden = torch.where(take(self.counts, rows), hidden, 0)
            for block, ranges in blocks:
                for ids in ranges:
                    self._add_outer(of_weight[ids], gradient[block, ids], hidden[block])
        self.fresh = False

    def _add_leading(self, rows: Leading, gradient: Tensor) -> None:
        of_input, of_weight, *_ = self.gradients
        scale, hidden = self.head.scale, take(self.input, rows)
        if self.rounded is not None:
            gradient = self._empty(len(gradient), self.rounded).copy_(gradient)
            hidden = hidden.to(self.rounded)
        if of_input is not None:
            result = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
            self.matmuls.multiply(gradient, self.weight, rows.count, result, scale=scale)
            put(of_input, rows, result)
        if of_weight is not None:
            self.matmuls.add_outer(of_weight, gradient, hidden, rows.count, scale=scale)

    def _blocks(self, gradient: Tensor, unit: Tensor) -> list[tuple[slice, list[slice]]]:
        """Rows, and the ranges of ids that the backward matmuls of these rows are over."""
        eps, rows = self.head.filter_eps, len(gradient)
        if eps == 0:
            return [(slice(0, rows), [slice(0, self.vocabulary)])]
        blocks = [slice(begin, begin + ROWS) for begin in range(0, rows, ROWS)]
        return [(block, kept(gradient[block], unit[block], eps)) for block in blocks]

    def _times_weight(self, gradient: Tensor, ranges: Sequence[slice]) -> Tensor:
        scale = self.head.scale
        if self.rounded is not None:
            result = torch.mm(gradient, self.weight, out_dtype=self.dtype)
            return result if scale == 1 else result.mul_(scale)
        result = gradient.new_zeros((len(gradient), self.weight.shape[1]))
        for ids, slab in self.slabs(ranges):
            torch.addmm(result, gradient[:, ids], slab, alpha=scale, out=result)
        return result

    def _add_outer(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        beta, scale = 0 if self.fresh else 1, self.head.scale
        if self.rounded is not None:
            torch.addmm(total, gradient.t(), hidden, out_dtype=self.dtype, beta=beta, alpha=scale, out=total)
        else:
            torch.addmm(total, gradient.t(), hidden, beta=beta, alpha=scale, out=total)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What matmuls of float32 are to be in, by those who called. A CPU ignores it: see :class:`fastkd.Head`."""
    asked = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if asked else None


def _operand_dtype(head: Head, autocast: torch.dtype | None) -> torch.dtype | None:
    """The 16-bit dtype whose matmul can return unrounded float32 here, if the operands have or get it."""
    if head.input.device.type != "cuda" or head.dtype is torch.float64:
        return None
    if autocast is not None:
        return autocast
    dtype = torch.promote_types(head.input.dtype, head.weight.dtype)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None
