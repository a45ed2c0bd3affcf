"""What a student is worth on data that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .. import _checks
from . import modes
from .accumulation import counted, rows_of
from .batches import mapped
from .distiller import Distiller
from .group import Group, members
from .paths import logits_in
from .precision import Precision
from .sampling import EpochBatches, batches_of
from .settings import Evaluates, Settings


def loader_of(val: Any, settings: Settings) -> Iterable[Any] | None:
    if val is None or isinstance(val, (DataLoader, IterableDataset)) or not hasattr(val, "__getitem__"):
        return val  # type: ignore[no-any-return]
    sampler = EpochBatches(len(val), settings.batch_size, shuffle=False, seed=settings.seed)
    return batches_of(val, sampler, settings.num_workers, settings.collate_fn, pin_memory=False)


def evaluate(
    distiller: Distiller | Group,
    val: Iterable[Any] | None,
    functions: Evaluates | Mapping[str, Evaluates] | None,
    precision: Precision,
    device: torch.device,
) -> dict[str, float]:
    """In evaluation mode and without gradients: the loss and the accuracy on ``val``, and what the functions say."""
    metrics: dict[str, float] = {}
    with torch.no_grad(), modes.kept(distiller):
        distiller.eval()
        if val is not None:
            metrics.update(_on(distiller, val, precision, device))
        if callable(functions):
            functions = {"": functions}
        for name, function in (functions or {}).items():
            metrics.update(_named(name, function, distiller.student))
    if not metrics:
        _checks.bad_value("fit", "evaluate", "return a metric", "none")
    for name in ("step", "epoch"):
        if name in metrics:
            _checks.bad_value("fit", "evaluate", "return metrics with other names than step and epoch", repr(name))
    return metrics


def _named(name: str, function: Evaluates, student: nn.Module) -> dict[str, float]:
    result = function(student)
    if isinstance(result, Mapping):
        return {f"{name}/{key}" if name else key: _number(value) for key, value in result.items()}
    return {name or getattr(function, "__name__", type(function).__name__): _number(result)}


def _number(value: Any) -> float:
    if not isinstance(value, SupportsFloat):
        _checks.bad_type("fit", "evaluate", "return a number or a dict of numbers", type(value).__name__)
    return float(value)


def _on(
    distiller: Distiller | Group, val: Iterable[Any], precision: Precision, device: torch.device
) -> dict[str, float]:
    """Means over all rows, whatever batches they come in."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Any] = {}
    right = {prefix: _Accuracy(one) for prefix, one in members(distiller)}
    batch = None
    for given in val:
        batch = mapped(lambda tensor: tensor.to(device), given)
        rows = rows_of(batch)
        count = counted(distiller, batch)
        normalizer = {name: 1.0 for name, value in count.items() if value is not None}
        with precision.autocast(), _watched(right, batch):
            share = {name: float(rows) for name, value in count.items() if value is None}
            _, parts = distiller.loss(batch, normalizer=normalizer, share=share)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + _wide(part)
            value = count[name]
            counts[name] = 1.0 if isinstance(value, float) else counts.get(name, 0) + (rows if value is None else value)
    if batch is None:
        _checks.bad_value("fit", "val", "have a batch", "none")
    means = {name: float(total / max(float(counts[name]), 1.0)) for name, total in sums.items()}
    weights = distiller.weights()
    # Of no term that counts the loss would be 0, which no later one could beat.
    found = {"loss": sum(weights[name] * mean for name, mean in means.items()) if means else math.nan}
    found |= {f"{prefix}accuracy": one.value() for prefix, one in right.items() if one.seen}
    return found | {f"term/{name}": mean for name, mean in means.items()}


def _wide(value: Tensor) -> Tensor:
    """Float64, where the device has it."""
    return value if value.device.type == "mps" else value.double()


@contextmanager
def _watched(right: Mapping[str, _Accuracy], batch: Any) -> Iterator[None]:
    """Sees what the students return while the loss is computed, so that they need not run once more."""
    handles = [one.distiller.student.register_forward_hook(one.hook(batch)) for one in right.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Accuracy:
    """Of one student, where it returns logits and there are labels that fit."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller
        options = next((term.options for term in distiller.terms if term.student == ""), {})
        self.dim, self.ignore = options.get("dim", -1), options.get("ignore_index", -100)
        self.right: Any = 0.0
        self.rows: Any = 0.0
        self.seen = False

    def hook(self, batch: Any) -> Callable[..., None]:
        labels = self.distiller._labels(batch)

        def see(_: nn.Module, __: Any, output: Any) -> None:
            logits = output if isinstance(output, Tensor) else logits_in(output)
            if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.ndim == 0:
                return
            if labels.is_floating_point() or logits.shape[self.dim] == 0:
                return
            guess = logits.argmax(self.dim)
            if guess.shape == labels.shape:
                self.seen, known = True, labels != self.ignore
                self.right = self.right + ((guess == labels) & known).sum()
                self.rows = self.rows + known.sum()

        return see

    def value(self) -> float:
        return float(self.right / self.rows) if float(self.rows) else float("nan")
