"""How far the numbers of two tensors are apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 2**20  # numbers that are float64 at a time: the logits of a batch may be the largest tensor there is


class Agreement:
    """Signal and noise of tensors that were compared so far, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.power = self.product = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        sums = torch.zeros(4, dtype=torch.float64, device=want.device)
        for a, b in zip(got.reshape(-1).split(CHUNK), want.reshape(-1).split(CHUNK), strict=True):
            x, y = a.detach().double(), b.detach().double()
            sums += torch.stack([y @ y, (x - y).square().sum(), x @ x, x @ y])
        signal, noise, power, product = sums.tolist()
        self.signal += signal
        self.noise += noise
        self.power += power
        self.product += product

    def sqnr(self) -> float:
        """Signal to quantisation noise, in dB: 10 more is a tenth of the squared error. NaN where a number is."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def cosine(self) -> float:
        norms = math.sqrt(self.signal * self.power)
        return self.product / norms if norms else float(self.noise == 0)
