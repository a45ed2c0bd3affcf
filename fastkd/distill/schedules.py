"""Numbers that change over training: weights, temperatures, and other options of terms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import _checks


class Schedule(ABC):
    """A number at each step of training. Points in time are given as an int, a step, or a float, a fraction of all.

    A class of your own has ``value(step, total)``.
    """

    @abstractmethod
    def value(self, step: int, total: int) -> float:
        """At this step, counted from 0, of so many."""


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``start`` to ``end`` along a line, between two points in time; before and after it does not change.

    Example:
        >>> [Linear(1.0, 0.0, until=4).value(step, 100) for step in (0, 1, 4, 50)]
        [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _checks.finite(type(self).__name__, name, getattr(self, name))
        for name in ("begin", "until"):
            _point(type(self).__name__, name, getattr(self, name))

    def value(self, step: int, total: int) -> float:
        begin, until = (_step(point, total) for point in (self.begin, self.until))
        if step >= until:
            return self.end
        along = max(0.0, (step - begin) / (until - begin)) if until > begin else 0.0
        return self.start + (self.end - self.start) * self.bend(along)

    def bend(self, along: float) -> float:
        return along


@dataclass(frozen=True)
class Cosine(Linear):
    """From ``start`` to ``end`` along half a wave of a cosine, flat at both ends.

    Example:
        >>> round(Cosine(1.0, 0.0).value(50, 100), 6)
        0.5
    """

    def bend(self, along: float) -> float:
        return (1 - math.cos(math.pi * along)) / 2


@dataclass(frozen=True)
class Warmup(Schedule):
    """From 0 to ``end`` along a line, and then ``end``.

    Example:
        >>> [Warmup(2.0, until=0.5).value(step, 100) for step in (0, 25, 50, 99)]
        [0.0, 1.0, 2.0, 2.0]
    """

    end: float
    until: float

    def __post_init__(self) -> None:
        _checks.finite("Warmup", "end", self.end)
        _point("Warmup", "until", self.until)

    def value(self, step: int, total: int) -> float:
        return Linear(0.0, self.end, until=self.until).value(step, total)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """The value of the last point in time that has come; the first has to be 0.

    Example:
        >>> [Piecewise({0: 1.0, 0.5: 0.1}).value(step, 100) for step in (0, 49, 50)]
        [1.0, 1.0, 0.1]
    """

    values: Mapping[float, float]

    def __post_init__(self) -> None:
        for point, value in self.values.items():
            _point("Piecewise", "values", point)
            _checks.finite("Piecewise", "values", value)
        if 0 not in self.values:
            _checks.bad_value("Piecewise", "values", "begin at 0", sorted(self.values))

    def value(self, step: int, total: int) -> float:
        come = [(_step(point, total), value) for point, value in self.values.items() if _step(point, total) <= step]
        return max(come, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class Function(Schedule):
    """A function of the fraction of training that is done, from 0 to 1.

    Example:
        >>> Function(math.sqrt).value(25, 100)
        0.5
    """

    function: Callable[[float], float]

    def value(self, step: int, total: int) -> float:
        return float(self.function(min(1.0, step / max(1, total))))


def _point(op: str, argument: str, value: Any) -> None:
    got = _checks.finite(op, argument, value)
    if got < 0 or (isinstance(value, float) and got > 1):
        _checks.bad_value(op, argument, "be a fraction from 0.0 to 1.0, or a step as an int", value)


def _step(point: float, total: int) -> float:
    return point * total if isinstance(point, float) else point
