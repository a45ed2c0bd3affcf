"""Small teachers and students of the three kinds that models come in, and what a teacher consists of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Vectors to classes, with everything that a mode changes."""

    def __init__(self, width: int, classes: int = 5, dropout: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class Dense(nn.Module):
    """Images to a map of classes."""

    def __init__(self, width: int, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.stem(x))))
        return logits


class Output:
    """As HuggingFace's models return."""

    def __init__(self, logits: Tensor, hidden_states: tuple[Tensor, ...]) -> None:
        self.logits, self.hidden_states = logits, hidden_states


class Text(nn.Module):
    """Ids to ids by layers of attention; called with keyword arguments."""

    def __init__(self, width: int, depth: int, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        x = self.embed(input_ids)
        hidden = [x]
        padding = None if attention_mask is None else attention_mask == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
            hidden.append(x)
        return Output(self.head(x), tuple(hidden))


def vectors(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.randint(classes, (rows,))


def texts(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids, mask = torch.randint(11, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[0, -2:] = 0
    labels = torch.where(mask == 1, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def everything_of(model: nn.Module) -> dict[str, Any]:
    """All numbers, as copies, and all modes; also who may learn."""
    numbers = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    return {"numbers": numbers, "modes": modes, "learns": [value.requires_grad for value in model.parameters()]}


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything_of(model)
    assert after["modes"] == before["modes"]
    assert after["learns"] == before["learns"]
    assert after["numbers"].keys() == before["numbers"].keys()
    for name, value in before["numbers"].items():
        assert torch.equal(after["numbers"][name], value), name
    assert all(value.grad is None for value in model.parameters())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
