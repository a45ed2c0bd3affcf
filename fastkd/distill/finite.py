"""A loss or a gradient that is no number ends a run, with the name of the term that it came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Watch:
    """Looks at every step. Where looking would wait for the device, it remembers there, and looks when asked."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type != "cpu"
        self.loss = torch.full((), -1.0, device=device)  # the first step of a NaN; -1 before there is one
        self.gradient = self.loss.clone()
        self.parts: dict[str, Tensor] = {}  # which were NaN at that step

    def see(self, step: int, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        self.loss = _first(self.loss, step, loss)
        for name, part in parts.items():
            found = torch.isnan(part) & (self.loss == step)
            self.parts[name] = found | self.parts[name] if name in self.parts else found
        if not self.waits:
            self.check()

    def see_gradient(self, step: int, norm: Tensor) -> None:
        self.gradient = _first(self.gradient, step, norm)
        if not self.waits:
            self.check()

    def check(self) -> None:
        """Raises FloatingPointError."""
        step, gradient = (int(first.item()) for first in (self.loss, self.gradient))
        if step >= 0:
            terms = [repr(name) for name, bad in self.parts.items() if bad.item()]
            what = f"term {', '.join(terms)} is" if terms else "the weighted sum of infinite terms is"
            raise FloatingPointError(f"fit: {what} NaN at step {step}")
        if gradient >= 0:
            raise FloatingPointError(f"fit: the gradient is NaN at step {gradient}, and the loss is not")


def _first(known: Tensor, step: int, value: Tensor) -> Tensor:
    return torch.where(torch.isnan(value) & (known < 0), float(step), known)
