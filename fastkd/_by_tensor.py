"""What is kept for a tensor as long as it lives."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class ByTensor(Generic[Value]):
    """Found by the tensor itself, whatever its numbers are; gone when it is."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        found = self._kept.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def set(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)
        self._kept[key] = weakref.ref(tensor, lambda gone: self._forget(key, gone)), value

    def __len__(self) -> int:
        return len(self._kept)

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        """Unless the key is another tensor's by now."""
        found = self._kept.get(key)
        if found is not None and found[0] is gone:
            del self._kept[key]
