"""What a layer does with its input: three ways, and for which layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .. import _checks

OBSERVERS = ("minmax", "moving_average", "percentile", "mse")


@dataclass(frozen=True)
class Dynamic:
    """int8 weights, and int8 inputs that are rounded as they come: each row (of a convolution each image) by its own
    largest magnitude. Nothing has to be known before.

    Args:
        skip: Patterns of names (``fnmatch``: ``"*.head"``) of layers that stay float.
    """

    scheme: ClassVar[str] = "dynamic"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", _patterns("Dynamic", self.skip))


@dataclass(frozen=True)
class Static:
    """int8 weights, and int8 inputs that are rounded with one scale, which :func:`calibrate` finds.

    Args:
        observer: What the scale covers: ``"minmax"`` the largest magnitude; ``"moving_average"`` the average of the
            batches' largest magnitudes, the newest counting ``1 - momentum``; ``"percentile"`` so many of the
            magnitudes; ``"mse"`` what makes the mean squared error smallest.
        momentum: For moving_average, in [0, 1].
        percentile: For percentile, in (0, 100].
        skip: Patterns of names of layers that stay float.
    """

    scheme: ClassVar[str] = "static"
    observer: str = "minmax"
    momentum: float = 0.9
    percentile: float = 99.99
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _checks.choice("Static", "observer", self.observer, OBSERVERS)
        _checks.fraction("Static", "momentum", self.momentum)
        if not 0 < _checks.finite("Static", "percentile", self.percentile) <= 100:
            _checks.bad_value("Static", "percentile", "be above 0 and at most 100", self.percentile)
        object.__setattr__(self, "skip", _patterns("Static", self.skip))


@dataclass(frozen=True)
class WeightOnly:
    """int8 weights, and float inputs: a quarter of the memory, with sums in float32.

    Args:
        skip: Patterns of names of layers that stay float.
    """

    scheme: ClassVar[str] = "weight only"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", _patterns("WeightOnly", self.skip))


Config: TypeAlias = Dynamic | Static | WeightOnly


def _patterns(op: str, value: object) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, (tuple, list)) or not all(isinstance(one, str) for one in given):
        _checks.bad_type(op, "skip", "be a pattern of names or a sequence of them", repr(value))
    return tuple(given)
