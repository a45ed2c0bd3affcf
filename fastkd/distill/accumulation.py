"""One divisor for all batches of a step, so that accumulating them gives the gradient of all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .batches import tensors
from .distiller import Distiller
from .group import Group, members, terms_of
from .term import Term


@dataclass(frozen=True)
class Scale:
    """What :meth:`Distiller.loss` takes for one batch."""

    normalizer: dict[str, Any] | None = None
    share: dict[str, float | Tensor] | None = None


def rows_of(batch: Any) -> int:
    """The first dimension of the first tensor."""
    first = next(tensors(batch), None)
    if first is None or first.ndim == 0:
        raise TypeError("fit: a batch must hold a tensor whose first dimension is that of its rows")
    return first.shape[0]


def scales(distiller: Distiller | Group, batches: Sequence[Any], device: torch.device) -> list[Scale]:
    """For each batch of a step, that of all ranks together.

    A term that takes a normalizer and means over labels gets the number of labels that count. Any other is multiplied
    by the batch's share of the rows: exact where all batches have as many rows that count. A sum is a sum.
    """
    if len(batches) == 1 and ranks.count() == 1:
        return [Scale()]
    # DistributedDataParallel means over ranks.
    every = ranks.count()
    counts = [counted(distiller, batch) for batch in batches]
    normalizer: dict[str, Any] = {}
    for name in counts[0]:
        values: list[Any] = [count[name] for count in counts]
        if isinstance(values[0], Tensor):
            normalizer[name] = ranks.total(torch.stack(values).sum()).clamp(min=1) / every
        elif values[0] is not None:
            normalizer[name] = values[0] / every
    sizes = torch.tensor([rows_of(batch) for batch in batches], dtype=torch.float32, device=device)
    everyones = ranks.total(sizes)
    shares, joint = sizes * every / everyones.sum(), everyones / everyones.sum()
    rest = {name: term for name, term in terms_of(distiller).items() if name not in normalizer}
    return [
        Scale(normalizer, {name: (joint if _is_joint(term) else shares)[index] for name, term in rest.items()})
        for index in range(len(batches))
    ]


def _is_joint(term: Term) -> bool:
    """Whether it is a loss on the rows of all ranks, the same on each."""
    return term.options.get("group") is not None


def counted(distiller: Distiller | Group, batch: Any) -> dict[str, Tensor | float | None]:
    """By term: the labels that count, 1 for a sum, None where no labels tell."""
    found: dict[str, Tensor | float | None] = {}
    for prefix, one in members(distiller):
        labels = one._labels(batch)
        for term in one.terms:
            found[prefix + term.name] = _count(term, labels, batch)
    return found


def _count(term: Term, labels: Any, batch: Any) -> Tensor | float | None:
    if not term.takes_normalizer:
        return None
    reduction = _option(term, "reduction", "mean")
    if reduction == "sum":
        return 1.0
    if callable(term.target):
        labels = term.target(batch)
    if not term.target or not isinstance(labels, Tensor) or term.row_weight is not None or reduction != "mean":
        return None
    if "row_weight" in term.options or labels.is_floating_point():
        return None
    counts: Tensor = labels != _option(term, "ignore_index", -100)
    return counts.sum()


def _option(term: Term, name: str, default: Any) -> Any:
    """As the term was given it, or the module that is its loss."""
    return term.options.get(name, getattr(term.loss, "options", {}).get(name, default))
