"""Scales of inputs: what each observer makes of what it has seen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8_models import ConvNet, Transformer, images, sqnr
from torch import Tensor, nn

from fastkd.int8 import Dynamic, Int8Linear, Static, WeightOnly, calibrate, prepare_qat_, quantize_


def scale_of(config: Static, *batches: Tensor) -> float:
    layer: Any = Int8Linear.from_float(nn.Linear(batches[0].shape[-1], 2), config).eval()
    with torch.no_grad(), calibrate(layer):
        for batch in batches:
            layer(batch)
    assert layer.input_scale.dtype is torch.float32
    return float(layer.input_scale)


def numbers(*magnitudes: float) -> Tensor:
    return torch.tensor([magnitudes])


def test_minmax() -> None:
    got = scale_of(Static(), numbers(1.0, -2.0), numbers(0.5, -12.7), numbers(3.0, 0.0))
    assert got == pytest.approx(0.1, rel=1e-7)


def test_moving_average() -> None:
    got = scale_of(Static("moving_average", momentum=0.75), numbers(4.0, 1.0), numbers(-8.0, 1.0))
    assert got == pytest.approx((0.75 * 4 + 0.25 * 8) / 127, rel=1e-6)


def test_percentile() -> None:
    """Against the sorted magnitudes; a batch that is far larger than those before changes the range."""
    batches = [torch.randn(40, 100) * factor for factor in (0.01, 1.0, 30.0)]
    every = torch.cat([batch.abs().flatten() for batch in batches]).sort().values
    for percentile in (50.0, 90.0, 99.9, 100.0):
        want = float(every[min(len(every) - 1, int(len(every) * percentile / 100))])
        got = 127 * scale_of(Static("percentile", percentile=percentile), *batches)
        assert got == pytest.approx(want, abs=float(every[-1]) / 2000)  # the width of a part
    assert 127 * scale_of(Static("percentile", percentile=100), *batches) == pytest.approx(float(every[-1]), rel=1e-6)


def test_a_percentile_that_is_met_exactly() -> None:
    values = torch.tensor([[1.0, 3.0]] * 50)
    assert 127 * scale_of(Static("percentile", percentile=50), values) == pytest.approx(1.0, rel=1e-3)


def test_mse() -> None:
    """The squared error of the scale that is found is hardly above that of any other."""
    values = torch.randn(500, 200)
    values[0, 0] = 15.0  # alone, and with minmax it takes two thirds of the steps
    scale = scale_of(Static("mse"), values[:50], values[50:])

    def error(step: float) -> float:
        rounded = (values.double() / step).round().clamp(-127, 127) * step
        return float((values - rounded).square().sum())

    tried = [error(15 / 127 * part / 100) for part in range(2, 101)]
    assert error(scale) <= 1.02 * min(tried)
    assert error(scale) < 0.9 * tried[-1]


def test_uniform_values_are_not_clipped_by_mse() -> None:
    values = torch.linspace(-1, 1, 20001).reshape(1, -1)
    assert scale_of(Static("mse"), values) * 127 == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse"])
def test_a_model(observer: str) -> None:
    model, x = ConvNet(), images(16)
    float_model = copy.deepcopy(model)
    quantize_(model, Static(observer, percentile=99.9))
    with torch.no_grad():
        with calibrate(model):
            inside = model(x)
            dynamic = copy.deepcopy(float_model)
            quantize_(dynamic, Dynamic())
            assert torch.equal(inside, dynamic(x)), "inside, each image is rounded by itself"
        assert sqnr(model(x), float_model(x)) > 20
        once = model(x)
        with calibrate(model):
            model(x)
        assert torch.equal(model(x), once)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_batches_of_nothing_and_of_zeros(observer: str) -> None:
    some = torch.rand(3, 4) + 0.5
    want = scale_of(Static(observer), some)
    assert scale_of(Static(observer), torch.zeros(0, 4), torch.zeros(2, 4), some) == pytest.approx(want, rel=1e-3)


def test_what_was_not_seen_is_said() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "dead": nn.Linear(4, 4)}).eval()
    quantize_(model, Static())

    def run() -> None:
        with calibrate(model):
            model["used"](torch.ones(1, 4))
            model["dead"](torch.zeros(1, 4))

    with pytest.warns(RuntimeWarning, match="layers saw no input, or nothing but zeros: unused, dead") as said:
        run()
    assert said[0].filename == __file__
    assert model["unused"].input_scale.isnan()


def test_keyword_arguments() -> None:
    model: Any = nn.Linear(4, 4).eval()
    quantize_(model, Static())
    with calibrate(model):
        model(input=torch.ones(1, 4))
    assert float(model.input_scale) == pytest.approx(1 / 127)


def test_an_exception_leaves_the_scales_as_they_were() -> None:
    model: Any = nn.Linear(4, 4).eval()
    quantize_(model, Static(), example=torch.ones(2, 4))
    before = model.input_scale.clone()

    def fail() -> None:
        with calibrate(model):
            model(torch.full((1, 4), 9.0))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model.input_scale, before)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("prepare", [quantize_, prepare_qat_])
@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_no_copy_is_made_inside(prepare: Callable[..., object], make: Callable[[nn.Module], Any]) -> None:
    """Which would have no scale, and round by row without a word."""
    model: Any = nn.Sequential(nn.Linear(4, 4)).eval()
    prepare(model, Static())
    with calibrate(model):
        model(torch.ones(1, 4))
        with pytest.raises(RuntimeError, match="calibrate: a model cannot be copied or saved inside: it has no"):
            make(model)
    assert make(model)
    assert float(copy.deepcopy(model)[0].input_scale) == float(model[0].input_scale) == pytest.approx(1 / 127)


def test_refused() -> None:
    model = Transformer()
    with (
        pytest.raises(ValueError, match=r"calibrate: model must have layers .* with Static\(\), got none"),
        calibrate(model),
    ):
        pass
    quantize_(model, {"*.mix": Static(), "*": WeightOnly()})
    with (
        pytest.raises(ValueError, match=r"calibrate: model must be run inside the context, .*, got no such run"),
        calibrate(model),
    ):
        pass
    with pytest.raises(TypeError, match=r"calibrate: model must be a torch\.nn\.Module, got int"), calibrate(3):  # type: ignore[arg-type]
        pass
    layer = nn.Linear(4, 4).eval()
    quantize_(layer, Static())
    for bad in (torch.nan, torch.inf):
        with (
            pytest.raises(ValueError, match="calibrate: model must be run on inputs that are finite at , got"),
            calibrate(layer),
        ):
            layer(torch.tensor([[1.0, bad, 0.0, 0.0]]))


def test_float_layers_that_are_trained_for_one_scale() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    prepare_qat_(model, Static())
    x = torch.randn(8, 4)
    assert model(x).isnan().all()
    with torch.no_grad(), calibrate(model.eval()):
        model(x)
    assert float(model[0].input_scale) == pytest.approx(float(x.abs().max()) / 127)
    assert model.train()(x).isfinite().all()
