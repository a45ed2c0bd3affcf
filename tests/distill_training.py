"""Networks and rows that train in milliseconds, and what a run left of them."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastkd import hint_loss, kd_loss
from fastkd.distill import Distiller, Term

SGD = partial(torch.optim.SGD, lr=0.1)


def network(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def rows(count: int = 24, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    labels[::5] = -100
    return TensorDataset(torch.randn(count, 6, generator=generator), labels)


def both(weight: float = 1.0, **options: Any) -> Distiller:
    terms = [Term(kd_loss, temperature=2.0, **options), Term(hint_loss, "1", "1", weight=weight, adapt="linear")]
    return Distiller(network(4), network(8, seed=9), terms).prepare((torch.zeros(1, 6), torch.zeros(1).long()))


def same(first: nn.Module, second: nn.Module, **bar: float) -> None:
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}", **bar)


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
