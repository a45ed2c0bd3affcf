"""What a scale of inputs is found from: the magnitudes that a layer has seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._int8 import LEVELS
from .configs import Static

BINS = 8192
# Ranges that the mean squared error is tried for, as parts of the largest magnitude: 1 down to 1/64.
PARTS = [2.0 ** (-i / 32) for i in range(192)]


class Observer:
    """The largest magnitude; what is derived from it replaces ``_see`` and ``covered``."""

    def __init__(self, config: Static) -> None:
        self.config = config
        self.largest = 0.0

    def see(self, layer: str, input: Tensor) -> None:
        magnitudes = input.detach().abs().reshape(-1).float()
        if not len(magnitudes):
            return
        largest = float(magnitudes.amax())
        if not math.isfinite(largest):
            _checks.bad_value("calibrate", "model", f"be run on inputs that are finite at {layer}", largest)
        self._see(magnitudes, largest)

    def _see(self, magnitudes: Tensor, largest: float) -> None:
        self.largest = max(self.largest, largest)

    def covered(self) -> float:
        """The magnitude that 127 steps reach."""
        return self.largest

    def scale(self) -> float | None:
        """None if nothing was seen, or nothing but zeros and what float32 makes zeros of."""
        # In float32, as the layers divide.
        scale = float(torch.tensor(self.covered()) / torch.tensor(float(LEVELS)))
        return scale if scale > 0 else None


class MovingAverage(Observer):
    def _see(self, magnitudes: Tensor, largest: float) -> None:
        momentum = self.config.momentum
        self.largest = momentum * self.largest + (1 - momentum) * largest if self.largest else largest


class Histogram(Observer):
    """How many magnitudes lie in each of so many equal parts of [0, range]."""

    def __init__(self, config: Static) -> None:
        super().__init__(config)
        self.range = 0.0
        self.counts: Tensor | None = None

    def _see(self, magnitudes: Tensor, largest: float) -> None:
        super()._see(magnitudes, largest)
        if self.counts is None:
            if largest == 0:
                return  # zeros lie below any range
            self.counts, self.range = torch.zeros(BINS, dtype=torch.int64, device=magnitudes.device), largest
        while largest > self.range:  # two parts become one, and the upper half is new
            self.range *= 2
            halves = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([halves, torch.zeros_like(halves)])
        places = (magnitudes.double() * (BINS / self.range)).long().clamp_(max=BINS - 1)
        self.counts += torch.bincount(places, minlength=BINS)

    def known(self) -> Tensor:
        assert self.counts is not None
        return self.counts.double()

    def middles(self) -> Tensor:
        return (torch.arange(BINS, dtype=torch.float64, device=self.known().device) + 0.5) * (self.range / BINS)


class Percentile(Histogram):
    def covered(self) -> float:
        if self.counts is None:
            return 0.0
        below = self.known().cumsum(0)
        bins = int((below < below[-1] * (self.config.percentile / 100)).sum()) + 1
        return min(self.largest, bins * self.range / BINS)


class MeanSquaredError(Histogram):
    def covered(self) -> float:
        if self.counts is None:
            return 0.0
        counts, middles = self.known(), self.middles()

        def error(part: float) -> float:
            step = part * self.largest / LEVELS
            rounded = (middles / step).round().clamp(max=LEVELS) * step
            return float((counts * (middles - rounded).square()).sum())

        best: float = min(PARTS, key=error)
        return best * self.largest


KINDS: dict[str, type[Observer]] = {
    "minmax": Observer,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
}


def observer(config: Static) -> Observer:
    return KINDS[config.observer](config)
