"""Small models with everything that quantising has to deal with, and the int8 formulas in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """What int8 makes of values, in float64; the division is float32's, as the layers'."""
    steps = (values.float() / scale.float()).nan_to_num(0.0).round().clamp(-127, 127)
    return steps.double() * scale.double()


def rounded_slices(values: Tensor, ndim: int) -> Tensor:
    """With one scale for each slice of so many dimensions, the last ones."""
    dims = tuple(range(values.ndim - ndim, values.ndim))
    return rounded(values, values.float().abs().amax(dims, keepdim=True) / torch.tensor(127.0))


def randomize(model: nn.Module) -> None:
    """Norms that do something, in evaluation mode: signs of both kinds too."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                for parameter in module.parameters():
                    parameter.normal_()
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    model.eval()


class ConvNet(nn.Module):
    """A norm that can be folded, one whose convolution is looked at too, one before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.branch_norm = nn.BatchNorm2d(8)
        self.pre_norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = self.branch(x)
        x = x + y + self.branch_norm(y)
        x = self.last(self.pre_norm(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Pre-norm attention and MLP, with norms written by hand and by torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.gain = nn.Parameter(torch.randn(width))
        self.wide, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        x = x + self.mix(mixed)
        y = self.gain * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
        out: Tensor = x + self.narrow(torch.relu(self.wide(y.to(x.dtype))))
        return out


class Transformer(nn.Module):
    """Ids to logits, the embedding being the head too."""

    def __init__(self, vocabulary: int = 40, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        randomize(self)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(ids))))
        return logits


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def ids(n: int = 3, length: int = 7) -> Tensor:
    return torch.randint(40, (n, length))


def sqnr(got: Tensor, want: Tensor) -> float:
    noise = (got.double() - want.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise))
