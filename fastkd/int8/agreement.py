"""How far the numbers of two tensors are apart."""

from __future__ import annotations

import math

from torch import Tensor


class Agreement:
    """Signal and noise of tensors that were compared so far, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.power = self.product = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        a, b = got.detach().double(), want.detach().double()
        self.signal += float(b.square().sum())
        self.noise += float((a - b).square().sum())
        self.power += float(a.square().sum())
        self.product += float((a * b).sum())

    def sqnr(self) -> float:
        """Signal to quantisation noise, in dB: 10 more is a tenth of the squared error. NaN where a number is."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def cosine(self) -> float:
        norms = math.sqrt(self.signal * self.power)
        return self.product / norms if norms else float(self.noise == 0)
