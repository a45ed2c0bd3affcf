"""Norms that become part of a convolution: where that is certain, and with the same int8 numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from int8_models import images, randomize, rounded_slices, sqnr
from torch import Tensor, nn

from fastkd.int8 import Int8Conv2d, WeightOnly, quantize_


def test_folding_keeps_the_int8_numbers() -> None:
    """The norm goes into scales and signs: what was rounded before it is rounded the same way."""
    conv, norm = nn.Conv2d(3, 6, 3, bias=True), nn.BatchNorm2d(6)
    model = nn.Sequential(conv, norm)
    randomize(model)
    norm.weight.data[2] = 0
    alone = Int8Conv2d.from_float(conv)
    reference = copy.deepcopy(model).double()
    reference[0].weight.data = rounded_slices(conv.weight.detach(), 3)
    quantize_(model, WeightOnly())
    made: Any = model[0]
    signs = torch.where(norm_weight(reference) < 0, -1, 1).reshape(-1, 1, 1, 1)
    assert torch.equal(made.weight, alone.weight * signs)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), reference(x.double()), rtol=1e-5, atol=1e-5)


def norm_weight(model: Any) -> Tensor:
    weight: Tensor = model[1].weight.detach()
    return weight


class Looped(nn.Module):
    """A Sequential whose parts are called one by one, and looked at in between: its order alone proves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        randomize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return tuple(seen)


class Optional_(nn.Module):
    """With its argument given, the output of the convolution goes elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        randomize(self)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        z: Tensor = self.norm(y)
        return z if scale is None else z + scale * y


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y + self.conv(x)


class Untraceable(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y if bool((x == x).all()) else y.neg()


@pytest.mark.parametrize("kind", [Looped, Optional_, Twice, Untraceable])
def test_norms_that_must_stay(kind: type[nn.Module]) -> None:
    model, x = kind(), images()
    float_model = copy.deepcopy(model)
    assert quantize_(model, WeightOnly()).folded == {}
    with torch.no_grad():
        got, want = model(x), float_model(x)
    for one, other in zip(*((a,) if isinstance(a, Tensor) else a for a in (got, want)), strict=True):
        assert sqnr(one, other) > 35


def test_what_keeps_a_norm_from_being_folded() -> None:
    def folded(change: Any) -> bool:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        randomize(model)
        change(model)
        return bool(quantize_(model).folded)

    assert folded(lambda model: None)
    assert not folded(lambda model: model[1].train())
    assert not folded(lambda model: model[0].register_forward_hook(lambda *_: None))
    assert not folded(lambda model: model[1].register_forward_pre_hook(lambda *_: None))
    assert folded(lambda model: model[1].register_forward_hook(lambda *_: None))
    statistics = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert not folded(lambda model: model.__setitem__(1, statistics))
    plain = nn.BatchNorm2d(4, affine=False).eval()
    assert folded(lambda model: model.__setitem__(1, plain))


def test_a_trace_leaves_nothing_in_the_model() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), None

        def forward(self, x: Tensor) -> Any:
            self.last = self.norm(self.conv(x))
            return self.last

    model = Keeps().eval()
    assert quantize_(model).folded
    assert model.last is None
