"""What a batch holds: the models' inputs, the labels, and what a cache knows of the teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

LABELS, TEACHER_OUTPUTS = "labels", "teacher_outputs"  # keys that are not arguments of a model


def inputs_of(batch: Any) -> Any:
    """A mapping without its labels; the first item of a pair of inputs and labels; or all of it."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in (LABELS, TEACHER_OUTPUTS)}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def labels_of(batch: Any) -> Any:
    """``batch["labels"]``, or the second item; None where there are none."""
    if isinstance(batch, Mapping):
        return batch.get(LABELS)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def next_token_labels(batch: Mapping[str, Tensor], ignore_index: int = -100) -> Tensor:
    """For ``labels`` of a :class:`Distiller`: ``batch["labels"]``, which are the input ids, as the logits predict them.

    Each position gets the next one's label, and the last ``ignore_index``. Logits are never shifted: that copies them.

    Example:
        >>> import torch
        >>> next_token_labels({"labels": torch.tensor([[5, 6, 7]])})
        tensor([[   6,    7, -100]])
    """
    return nn.functional.pad(batch[LABELS][..., 1:], (0, 1), value=ignore_index)


def cached_of(batch: Any) -> Mapping[str, Any] | None:
    """``batch["teacher_outputs"]``"""
    return batch.get(TEACHER_OUTPUTS) if isinstance(batch, Mapping) else None


def call(model: nn.Module, inputs: Any) -> Any:
    """With a mapping as keyword arguments, a tuple as positional ones, anything else (a list too) as the one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A tensor, or a nest of mappings and sequences of tensors, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(change, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(change, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(change, item) for item in value)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in such a nest."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


@dataclass(frozen=True)
class OfBatch:
    """An option of a term that is taken from each batch: by its key, or by a function of the batch.

    Example:
        >>> OfBatch("attention_mask")({"attention_mask": 1})
        1
    """

    what: str | int | Callable[[Any], Any]

    def __call__(self, batch: Any) -> Any:
        return self.what(batch) if callable(self.what) else batch[self.what]
