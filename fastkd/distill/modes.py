"""Which submodules train: those that learn, and none that is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the modes of its submodules, they are put back."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def train(model: nn.Module) -> None:
    """Training mode, but for submodules of which no parameter learns: their statistics and dropout stay as they are."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
