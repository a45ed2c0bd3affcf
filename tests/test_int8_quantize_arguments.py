"""Every refusal of ``quantize_`` and the configs, with its message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastkd.int8 import Dynamic, Int8Conv2d, Int8Embedding, Int8Linear, Static, WeightOnly, dequantize, quantize_

REFUSED: dict[str, tuple[type[Exception], str, Any, dict[str, Any]]] = {
    "model": (TypeError, "quantize_: model must be a torch.nn.Module, got int", 3, {}),
    "training": (
        ValueError,
        "quantize_: model must be in evaluation mode (call eval()), got training=True",
        nn.Linear(4, 4),
        {},
    ),
    "config": (
        TypeError,
        "quantize_: config must be Dynamic(), Static() or WeightOnly(), or a dict of patterns to these or None, got 8",
        nn.Linear(4, 4).eval(),
        {"config": 8},
    ),
    "config in a dict": (
        TypeError,
        "quantize_: config must be Dynamic(), Static() or WeightOnly(), or a dict of patterns to these or None, got 9",
        nn.Linear(4, 4).eval(),
        {"config": {"*": 9}},
    ),
    "pattern": (
        ValueError,
        "quantize_: config must have patterns that match a name in the model, got 'lm_haed'",
        nn.Sequential(nn.Linear(4, 4)).eval(),
        {"config": Dynamic(skip="lm_haed")},
    ),
    "nothing": (
        ValueError,
        "quantize_: model must have a layer that may become int8, got {'0': 'Conv1d has no int8 form'}",
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()).eval(),
        {},
    ),
    "nothing with weights": (
        ValueError,
        "quantize_: model must have a layer that may become int8, got none with weights",
        nn.ReLU().eval(),
        {},
    ),
    "example": (
        TypeError,
        "quantize_: example must be a tensor, a tuple of arguments or a dict of keyword arguments, got list",
        nn.Linear(4, 4).eval(),
        {"example": [1]},
    ),
    "no example": (
        ValueError,
        "quantize_: example must be given with min_sqnr, got None",
        nn.Linear(4, 4).eval(),
        {"min_sqnr": 20},
    ),
    "min_sqnr": (
        TypeError,
        "quantize_: min_sqnr must be a number, got str",
        nn.Linear(4, 4).eval(),
        {"min_sqnr": "20", "example": torch.zeros(1, 4)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, message, model, options = REFUSED[case]
    with pytest.raises(error) as raised:
        quantize_(model, **options)
    assert str(raised.value) == message


def test_weights_that_are_not_finite() -> None:
    """Nothing is changed before it is seen."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"quantize_: model must have finite numbers in 1\.bias, got NaN or infinity"):
        quantize_(model)
    assert type(model[0]) is nn.Linear


def test_layers_refuse() -> None:
    weight = torch.zeros(3, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"Int8Linear: weight must be int8, got torch\.float32"):
        Int8Linear(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="Int8Conv2d: weight must have 4 dimensions, got shape"):
        Int8Conv2d(weight, torch.ones(3))
    with pytest.raises(ValueError, match="Int8Embedding: scale must have one number for each of 3 channels, got shape"):
        Int8Embedding(weight, torch.ones(4))
    with pytest.raises(TypeError, match="Int8Linear: bias must be a tensor, got list"):
        Int8Linear(weight, torch.ones(3), [0.0] * 3)  # type: ignore[arg-type]
    layer = Int8Linear(weight, torch.ones(3).double(), torch.ones(3).half())
    assert layer.scale.dtype is torch.float32
    assert torch.equal(layer(torch.ones(2, 4)), torch.ones(2, 3))


def test_configs_refuse() -> None:
    with pytest.raises(ValueError, match=r"Static: observer must be one of minmax, .*, got 'max'"):
        Static("max")
    with pytest.raises(ValueError, match="Static: momentum must be from 0 to 1, got 2"):
        Static(momentum=2)
    with pytest.raises(ValueError, match="Static: percentile must be above 0 and at most 100, got 0"):
        Static(percentile=0)
    with pytest.raises(TypeError, match="Dynamic: skip must be a pattern of names or a sequence of them, got 3"):
        Dynamic(skip=3)  # type: ignore[arg-type]
    assert WeightOnly(skip=["a", "b"]).skip == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dequantize: model must be a torch\.nn\.Module, got int"):
        dequantize(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Int8Conv2d: padding_mode must be one of zeros, .*, got 'wrap'"):
        Int8Conv2d(torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.ones(1), padding_mode="wrap")
