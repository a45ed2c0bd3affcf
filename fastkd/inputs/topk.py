"""A teacher known by a few ids a row and their log-probabilities, as caches and serving engines hand them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._workspace import workspace
from . import _rounded
from .head import Head

TAILS = ("bucket", "renormalize", "support", "uniform", "samples")
ABSENT = -1


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher of which only k ids a row are known.

    With P the known probabilities and q the student's, the ``tail`` says what becomes of all other ids:

    * ``"bucket"``: one more event, of probability max(1 - sum P, 0), compared with the student's mass of all other ids.
      A lower bound of the whole divergence, exact where nothing is known about the others. In the reverse divergences
      that probability is at least 2^-24: at 0 they would be infinite. Where the student's other ids are all masked
      (-inf), one up to 2^-16 is taken for rounding, and for 0.
    * ``"renormalize"``: P / sum P, nothing elsewhere, against the whole q. The reverse divergences would be infinite.
    * ``"support"``: P / sum P against q renormalised on the same ids. The other ids get no gradient.
    * ``"uniform"``: the rest of the probability spread evenly over the other ids. Costs what a teacher's logits cost.
    * ``"samples"``: made by :meth:`from_samples`.

    forward_kl, skew_kl, jsd, tvd and cross_entropy take all of them but samples; reverse_kl and skew_reverse_kl take
    bucket, support and uniform; samples are for forward_kl and cross_entropy. mse takes none.

    Args:
        indices: ``(..., k)`` ids, integers, each once in a row; -1 for an entry that is absent.
        log_probs: ``(..., k)`` their log-probabilities, any float dtype.
        tail: see above.
        temperature: At which they were recorded. A loss has to use it as this teacher's temperature, except that
            ``renormalize`` and ``support`` convert to any other, exactly.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes that differ, another device, an unknown tail, a temperature that is not positive. From the
            losses, on the CPU: an id that is out of range or twice in a row, probabilities that add up to more than 1.

    Example:
        >>> teacher = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.6, 0.3]]).log())
        >>> teacher.k
        2
    """

    indices: Tensor
    log_probs: Tensor
    _: KW_ONLY
    tail: str = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("indices", self.indices), ("log_probs", self.log_probs)):
            if not isinstance(value, Tensor):
                _checks.bad_type("TopK", name, "be a tensor", type(value).__name__)
        if self.indices.dtype not in _checks.INTEGERS:
            _checks.bad_type("TopK", "indices", "hold integer ids", self.indices.dtype)
        if self.log_probs.dtype not in _checks.FLOATS:
            _checks.bad_type("TopK", "log_probs", "be float16, bfloat16, float32 or float64", self.log_probs.dtype)
        if self.indices.ndim == 0 or self.indices.shape[-1] == 0:
            _checks.bad_value("TopK", "indices", "have a last dimension, k > 0", tuple(self.indices.shape))
        if self.log_probs.shape != self.indices.shape:
            rule = f"have the shape of the indices, {tuple(self.indices.shape)}"
            _checks.bad_value("TopK", "log_probs", rule, tuple(self.log_probs.shape))
        if self.log_probs.device != self.indices.device:
            _checks.bad_value("TopK", "log_probs", f"be where the indices are, {self.indices.device}", self.device)
        _checks.choice("TopK", "tail", self.tail, TAILS)
        _checks.positive("TopK", "temperature", self.temperature)

    @property
    def k(self) -> int:
        return int(self.indices.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.log_probs.dtype

    @property
    def device(self) -> torch.device:
        return self.log_probs.device

    def tensors(self) -> tuple[Tensor, ...]:
        return self.indices, self.log_probs

    def names(self) -> tuple[str, ...]:
        """Of the arguments that are tensors."""
        return "indices", "log_probs"

    def options(self) -> dict[str, Any]:
        """The keyword arguments that are no tensors."""
        return {"tail": self.tail, "temperature": self.temperature}

    @classmethod
    def from_logits(
        cls,
        logits: Tensor | Head,
        k: int,
        *,
        indices: Tensor | None = None,
        temperature: float = 1.0,
        tail: str = "bucket",
    ) -> TopK:
        """The k best ids of each row ``(..., V)``, and their log-probabilities at ``temperature`` among all V.

        Computed a few rows at a time, so a :class:`Head` is never materialised.

        Args:
            logits: The teacher's, or its head.
            k: How many ids, at most V.
            indices: ``(..., k)`` ids to take instead of the best ones, such as the student's best.
            temperature: At which to record.
            tail: of the result.

        Example:
            >>> TopK.from_logits(torch.tensor([[0.0, 2.0, 1.0]]), 2).indices
            tensor([[1, 2]])
        """
        if not isinstance(logits, Head):
            _checks.logits("TopK.from_logits", "logits", logits, "a tensor of logits or a Head")
        vocabulary = logits.shape[-1]
        if not 1 <= _checks.count("TopK.from_logits", "k", k) <= vocabulary:
            _checks.bad_value("TopK.from_logits", "k", f"be from 1 to {vocabulary}, the vocabulary", k)
        temperature = _checks.positive("TopK.from_logits", "temperature", temperature)
        shape = logits.shape[:-1]
        if indices is not None:
            _check_ids(indices, (*shape, k), vocabulary)
        chosen = None if indices is None else indices.reshape(-1, k).long()
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            parts = [
                _best(part, k, None if chosen is None else chosen[rows], temperature) for rows, part in _by_rows(logits)
            ]
            ids, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(ids.view(*shape, k), log_probs.view(*shape, k), tail=tail, temperature=temperature)

    @classmethod
    def from_samples(cls, indices: Tensor, counts: Tensor, *, temperature: float = 1.0) -> TopK:
        """Ids that were drawn from the teacher at ``temperature``, and how often: the teacher is counts / their sum.

        The gradient of forward_kl and of cross_entropy is then unbiased: its mean over draws is that of the whole
        teacher. Their value is not: cross_entropy's is, but the entropy of counts / n, which forward_kl takes off, is
        too small by about (k - 1) / (2 n).

        Args:
            indices: ``(..., k)`` ids, each once in a row; -1 for none.
            counts: ``(..., k)``, not negative.

        Source: Anshumann et al. 2025, arXiv 2503.16870 (random sampling knowledge distillation).

        Example:
            >>> TopK.from_samples(torch.tensor([[7, 3]]), torch.tensor([[3, 1]])).log_probs.exp()
            tensor([[0.7500, 0.2500]])
        """
        for name, value in (("indices", indices), ("counts", counts)):
            if not isinstance(value, Tensor):
                _checks.bad_type("TopK.from_samples", name, "be a tensor", type(value).__name__)
        if counts.device.type == "cpu" and bool((counts < 0).any()):
            _checks.bad_value("TopK.from_samples", "counts", "not be negative", counts.min().item())
        present = torch.where(indices == ABSENT, 0, counts).double()
        log_probs = (present / present.sum(-1, keepdim=True)).log().float()
        return cls(indices, log_probs, tail="samples", temperature=temperature)

    @classmethod
    def from_vllm(
        cls,
        logprobs: Sequence[Any],
        *,
        k: int | None = None,
        device: torch.device | str = "cpu",
        tail: str = "bucket",
        temperature: float = 1.0,
    ) -> TopK:
        """From what vLLM returns: for each position a dict from id to log-probability, or None.

        Args:
            logprobs: One sequence's ``output.outputs[0].logprobs`` or ``output.prompt_logprobs``, or a list of such
                sequences, which gives a batch padded with absent entries. The values have an attribute ``logprob``, or
                are numbers (as in other engines' JSON).
            k: Entries to keep, the best ones; None for as many as any position has (vLLM adds the sampled id to its k).
            device: of the result.
            tail: of the result.
            temperature: At which the engine computed them: 1, unless it was told to return processed ones.

        Returns:
            A TopK of shape ``(tokens, k)``, or ``(batch, tokens, k)``. A position without entries has nothing but a
            tail: under ``bucket`` its divergence is 0.

        Example:
            >>> TopK.from_vllm([None, {5: -0.1, 3: -2.5}]).indices
            tensor([[-1, -1],
                    [ 5,  3]])
        """
        batch = [logprobs] if _is_sequence(logprobs) else list(logprobs)
        rows = [[_entries(position) for position in sequence] for sequence in batch]
        most = max((len(entries) for row in rows for entries in row), default=0)
        width = max(1, most if k is None else _checks.count("TopK.from_vllm", "k", k))
        length = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), length, width), ABSENT, dtype=torch.int64)
        values = torch.full((len(rows), length, width), -torch.inf, dtype=torch.float32)
        for i, row in enumerate(rows):
            for j, entries in enumerate(row):
                kept = entries[:width]
                ids[i, j, : len(kept)] = torch.tensor([one for one, _ in kept], dtype=torch.int64)
                values[i, j, : len(kept)] = torch.tensor([value for _, value in kept], dtype=torch.float32)
        if _is_sequence(logprobs):
            ids, values = ids[0], values[0]
        return cls(ids.to(device), values.to(device), tail=tail, temperature=temperature)


def _check_ids(indices: Tensor, shape: tuple[int, ...], vocabulary: int) -> None:
    op = "TopK.from_logits"
    if not isinstance(indices, Tensor):
        _checks.bad_type(op, "indices", "be a tensor", type(indices).__name__)
    if indices.dtype not in _checks.INTEGERS:
        _checks.bad_type(op, "indices", "hold integer ids", indices.dtype)
    if indices.shape != shape:
        _checks.bad_value(op, "indices", f"have shape {shape}", tuple(indices.shape))
    outside = (indices < 0) | (indices >= vocabulary)
    if indices.device.type == "cpu" and bool(outside.any()):
        _checks.bad_value(op, "indices", f"hold ids from 0 to {vocabulary - 1}", int(indices[outside][0]))


def _is_sequence(logprobs: Sequence[Any]) -> bool:
    """One sequence of positions, rather than several."""
    return all(position is None or isinstance(position, Mapping) for position in logprobs)


def _entries(position: Mapping[int, Any] | None) -> list[tuple[int, float]]:
    """Best first."""
    entries = [(int(one), float(getattr(value, "logprob", value))) for one, value in (position or {}).items()]
    return sorted(entries, key=lambda entry: -entry[1])


def _by_rows(logits: Tensor | Head) -> Iterator[tuple[slice, Tensor]]:
    """Logits in parts that fit the workspace."""
    vocabulary = logits.shape[-1]
    step = max(1, workspace(logits.device) // (4 * vocabulary * logits.dtype.itemsize))
    stored = logits.input if isinstance(logits, Head) else logits
    rows = stored.detach().reshape(-1, stored.shape[-1])
    for begin in range(0, max(1, len(rows)), step):
        part = slice(begin, begin + step)
        if isinstance(logits, Head):
            yield part, _logits_of(logits, rows[part])
        else:
            yield part, rows[part]


def _logits_of(head: Head, hidden: Tensor) -> Tensor:
    if head.weight_scale is not None:
        return _rounded.logits_of(head, hidden, head.dtype)
    bias = None if head.bias is None else head.bias.detach()
    return Head(hidden, head.weight.detach(), bias, **head.options()).logits()


def _best(logits: Tensor, k: int, ids: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    wide = logits if logits.dtype is torch.float64 else logits.float()
    values, ids = wide.topk(k) if ids is None else (wide.gather(-1, ids), ids)
    return ids, values / temperature - torch.logsumexp(wide / temperature, -1, keepdim=True)
