"""Adapters and losses that are modules."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from feature_problems import flat
from torch import Tensor, nn

import fastkd


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_linear(shape: tuple[int, ...]) -> None:
    adapter = fastkd.Adapter("linear", 4, 6)
    x = torch.randn(shape)
    assert torch.equal(adapter(x), adapter.module(x))
    assert adapter(x).shape == (*shape[:-1], 6)
    assert [name for name, _ in adapter.named_parameters()] == ["module.weight", "module.bias"]


@pytest.mark.parametrize("positions", [(7,), (3, 5), (2, 3, 2)])
def test_conv(positions: tuple[int, ...]) -> None:
    """The same at every position."""
    adapter = fastkd.Adapter("conv", 4, 6, bias=False)
    x = torch.randn(2, 4, *positions)
    weight = dict(adapter.named_parameters())["module.weight"]
    torch.testing.assert_close(adapter(x), torch.einsum("oi,ni...->no...", weight[..., 0, 0], x))
    assert len(list(adapter.parameters())) == 1


def test_a_module_of_ones_own() -> None:
    own = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
    adapter = fastkd.Adapter(own)
    assert adapter.module is own
    assert adapter(torch.randn(2, 4, 3, 3)).shape == (2, 6, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("mlp", 4, 6), ValueError, "kind must be one of linear, conv, got 'mlp'"),
        ((3, 4, 6), TypeError, "kind must be a module or one of linear, conv, got int"),
        (("linear", 4), TypeError, "out_features must be an integer, got NoneType"),
        (("conv", 0, 6), ValueError, "in_features must be positive, got 0"),
        ((nn.Identity(), 4, 6), TypeError, "in_features must be left out beside a module, got Identity"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(f'Adapter: {words}')}$"):
        fastkd.Adapter(*arguments)


def test_training_with_an_adapter() -> None:
    """Student and adapter learn together."""
    student, criterion = nn.Linear(8, 4), fastkd.FeatureLoss(fastkd.hint_loss, adapter=fastkd.Adapter("linear", 4, 6))
    x, teacher = flat(32, 8), flat(32, 8) @ flat(8, 6, 1)
    optimizer = torch.optim.Adam([*student.parameters(), *criterion.parameters()], lr=0.03)
    before = copy.deepcopy(criterion.state_dict())
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = criterion(student(x), teacher)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert list(before) == ["adapter.module.weight", "adapter.module.bias"]
    assert all(not torch.equal(before[name], value) for name, value in criterion.state_dict().items())


@pytest.mark.parametrize(
    "loss",
    [
        fastkd.gram_loss,
        fastkd.cosine_relation_loss,
        fastkd.similarity_preserving_loss,
        fastkd.cka_loss,
        fastkd.rkd_distance_loss,
        fastkd.rkd_angle_loss,
        fastkd.hint_loss,
    ],
)
def test_every_loss_is_a_module(loss: Any) -> None:
    student, teacher = flat(), flat(seed=1)
    criterion = fastkd.FeatureLoss(loss, impl="reference")
    assert torch.equal(criterion(student, teacher), loss(student, teacher, impl="reference"))
    taught = fastkd.prepare_teacher(teacher)
    assert torch.equal(criterion(student, taught), loss(student, teacher, impl="reference"))
    assert repr(criterion) == f"FeatureLoss({loss.__name__}, impl='reference')"
    with pytest.raises(TypeError, match=r"^FeatureLoss: loss must be a function or a module, got str$"):
        fastkd.FeatureLoss(loss.__name__)
    with pytest.raises(TypeError, match=r"^FeatureLoss: adapter must be a function or a module, got str$"):
        fastkd.FeatureLoss(loss, adapter="linear")
    rule = f"^FeatureLoss: temperature must be a keyword argument of {loss.__name__}, got temperature$"
    with pytest.raises(TypeError, match=rule):
        fastkd.FeatureLoss(loss, temperature=2.0)


def test_options_of_a_call_replace_those_held() -> None:
    student, teacher = flat(), flat(seed=1)
    criterion = fastkd.FeatureLoss(fastkd.gram_loss, reduction="sum")
    assert torch.equal(criterion(student, teacher, reduction="mean"), fastkd.gram_loss(student, teacher))

    def halved(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return fastkd.gram_loss(student, teacher, **options) / 2

    assert torch.equal(fastkd.FeatureLoss(halved, reduction="sum")(student, teacher), criterion(student, teacher) / 2)
