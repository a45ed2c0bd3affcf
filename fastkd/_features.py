"""What every implementation of a loss on features is asked, and what it hands back.

``losses/`` checks a user's arguments. In each implementation the file of a family has one function for each loss, named
as the loss is::

    gram_loss(student, teacher, gradient, **options) -> loss, d loss / d student or None

Student and teacher are :class:`Features`. ``loss`` is 0-dim, float32 or float64. The gradient is computed with the
loss, if ``gradient`` says that one is wanted, since both come from the same matrices, which then need not be kept. It
has the student's shape and the dtype of the loss, so that it can be scaled before it is rounded. Numbers among the
options are floats, and a choice is a string; a tensor that a loss takes besides is an option too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor | None]


class Features:
    """A batch of features, and what was computed from them so far. The features must not change.

    Who keeps a quantity names the dtype that it was rounded to, since losses of several dtypes may ask for it.
    """

    __slots__ = ("kept", "tensor", "version")

    def __init__(self, tensor: Tensor, kept: dict[str, Tensor] | None = None, version: int | None = None) -> None:
        self.tensor = tensor.detach()
        self.kept = {} if kept is None else kept
        self.version = version  # the tensor's own, where it could change while the features are in use

    @property
    def modified(self) -> bool:
        return self.version is not None and self.tensor._version != self.version

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a copy, the tensor counts its changes anew."""
        return _copied, (self.tensor, self.kept, self.modified)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.tensor.shape)}, kept={sorted(self.kept)})"


def version_of(tensor: Tensor) -> int | None:
    """None for a tensor of inference mode, which counts no changes."""
    return None if tensor.is_inference() else tensor._version


def _copied(tensor: Tensor, kept: dict[str, Tensor], modified: bool) -> Features:
    version = version_of(tensor)
    return Features(tensor, kept, -1 if modified and version is not None else version)


def keep(features: Features, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """A quantity of features that is computed when it is first asked for."""
    value = features.kept.get(name)
    if value is None:
        value = features.kept[name] = compute()
    return value


def kept(compute: Callable[[Tensor], Tensor]) -> Callable[[Features], Tensor]:
    """:func:`keep` for a quantity that has a function of its own, of the tensor alone."""

    @functools.wraps(compute)
    def quantity(features: Features) -> Tensor:
        return keep(features, compute.__name__, lambda: compute(features.tensor))

    return quantity


def result_dtype(student: Features, teacher: Features) -> torch.dtype:
    wide = torch.float64 in (student.tensor.dtype, teacher.tensor.dtype)
    return torch.float64 if wide else torch.float32
