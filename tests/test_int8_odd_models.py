"""What people do with models that quantising has to survive, or to refuse in words."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from int8_problems import ACTIVATIONS
from torch import Tensor, nn

from fastkd.int8 import (
    Dynamic,
    Int8Conv2d,
    Int8Linear,
    Static,
    WeightOnly,
    calibrate,
    dequantize,
    quantize_,
    report,
)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were packed."""
    from fastkd.native import int8_packing

    seen: list[Tensor] = []
    pack = int8_packing._pack
    monkeypatch.setattr(int8_packing, "_pack", lambda weight, shape: (seen.append(weight), pack(weight, shape))[1])
    return seen


@pytest.mark.native
def test_weights_are_packed_once_in_another_memory_format(packs: list[Tensor]) -> None:
    """``channels_last`` is for what a convolution reads and writes; its weight is packed in any case."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).eval()
    quantize_(model)
    x = torch.randn(2, 8, 5, 5)
    want = model(x)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    packs.clear()
    for _ in range(3):
        assert torch.equal(model(x), want)
    assert len(packs) <= 1
    assert model[0].weight.is_contiguous()


@pytest.mark.native
def test_weights_are_packed_once_after_quantising_in_inference_mode(packs: list[Tensor]) -> None:
    for built_there in (False, True):
        with torch.inference_mode():
            inner = nn.Linear(64, 64).eval()
        model = inner if built_there else nn.Linear(64, 64).eval()
        x = torch.randn(2, 64)
        with torch.inference_mode():
            quantize_(model, example=x)
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
        packs.clear()
        with torch.no_grad():
            for _ in range(3):
                model(x)
        assert len(packs) <= 1, "the example may have packed it"
        with torch.inference_mode():
            assert not any(tensor.is_inference() for tensor in dequantize(model).state_dict().values())


def test_calibrating_twice_at_a_time_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4)).eval()
    quantize_(model, Static())
    with calibrate(model):
        model(torch.ones(1, 4))
        message = "calibrate: model must have no layer that is calibrated already, got 0 in another context"
        with pytest.raises(ValueError, match=message), calibrate(model):
            pass
        model(torch.full((1, 4), 2.0))
    assert float(model[0].input_scale) == pytest.approx(2 / 127)
    with calibrate(model):
        model(torch.ones(1, 4))
    assert float(model[0].input_scale) == pytest.approx(1 / 127)


def test_calibrated_in_inference_mode() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4)).eval()
    quantize_(model, Static())
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode(), calibrate(model):
        model(torch.ones(1, 4))
    assert float(model[0].input_scale) == pytest.approx(1 / 127)
    model.load_state_dict(state)
    assert model[0].input_scale.isnan()


def test_inputs_too_small_for_a_scale_are_none() -> None:
    model: Any = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).eval()
    quantize_(model, Static())

    def run() -> None:
        with calibrate(model):
            model[0](torch.ones(1, 4))
            model[1](torch.full((1, 4), 1e-44))

    with pytest.warns(RuntimeWarning, match="saw no input, or nothing but zeros: 1"):
        run()
    assert model[1].input_scale.isnan()


@dataclass
class Output:
    logits: Tensor


class Returning(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(8, 5), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.layer(x))


@pytest.mark.parametrize(
    "how", [lambda y: {"logits": y, "n": 3}, lambda y: (y, None), lambda y: [y], lambda y: {"nested": [(y,)]}]
)
def test_reports_of_what_models_return(how: Any) -> None:
    model = Returning(how).eval()
    float_model, x = copy.deepcopy(model), torch.randn(6, 8)
    quantize_(model)
    found = report(model, float_model, x, repeat=0)
    assert found.sqnr == found.layers[0].own_sqnr
    assert 30 < found.sqnr < 80


@pytest.mark.parametrize(("how", "got"), [(Output, "Output"), (lambda y: y.argmax(-1), "Tensor"), (id, "int")])
def test_nothing_to_compare_is_no_agreement(how: Any, got: str) -> None:
    model = Returning(how).eval()
    float_model = copy.deepcopy(model)
    quantize_(model)
    message = "report: model must return floating-point tensors, maybe in tuples, lists or dicts, got"
    with pytest.raises(ValueError, match=f"{message} {got}$"):
        report(model, float_model, torch.randn(6, 8), repeat=0)


def test_what_belongs_to_a_layer_stays() -> None:
    layer: Any = nn.Linear(4, 3).eval()
    layer.note = "mine"
    layer.weight.data.mul_(2)
    assert quantize_(layer).layers == {"": "dynamic"}
    assert layer.note == "mine"
    assert copy.deepcopy(layer).note == "mine"
    assert dequantize(layer).note == "mine"  # type: ignore[union-attr]
    assert layer.in_features == 4


def test_a_layer_that_holds_more_is_left() -> None:
    """It would be lost, or never used."""
    with_buffer, with_layer, with_parameter = (nn.Linear(4, 4) for _ in range(3))
    with_buffer.register_buffer("mask", torch.ones(4))
    with_layer.adapter = nn.Linear(4, 4)
    with_parameter.gain = nn.Parameter(torch.ones(4))
    held = {"buffer": with_buffer, "layer": with_layer, "parameter": with_parameter}
    model = nn.ModuleDict({**held, "lazy": nn.LazyLinear(4), "plain": nn.Linear(4, 4)}).eval()
    done = quantize_(model)
    assert done.layers == {"layer.adapter": "dynamic", "plain": "dynamic"}
    assert done.left == {
        "buffer": "it also holds mask",
        "layer": "it also holds adapter",
        "parameter": "it also holds gain",
        "lazy": "it is not initialized: run the model once before",
    }


def test_state_of_another_kind() -> None:
    """int8 into float, one scheme into another: told, not taken."""
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    dynamic, static = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(dynamic)
    quantize_(static, Static(), example=torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.scale\""):
        model.load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.input_scale\""):
        dynamic.load_state_dict(static.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.input_scale\""):
        static.load_state_dict(dynamic.state_dict())


@pytest.mark.native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_was_forked_while_layers_ran() -> None:
    torch.set_num_threads(2)
    layer = nn.Linear(256, 256).eval()
    quantize_(layer)
    x = torch.randn(64, 256)
    with torch.no_grad():
        want = layer(x)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if torch.equal(layer(x), want) else 1)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.native
def test_shared_memory_keeps_ties() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).eval()
    model[1].weight = model[0].weight
    quantize_(model)
    model.share_memory()
    assert model[0].weight is model[1].weight
    assert model[0].weight.is_shared()


@pytest.mark.native
@pytest.mark.parametrize("terms", [65536, 70000])
def test_long_rows_of_a_module(terms: int) -> None:
    weight = torch.full((2, terms), -128, dtype=torch.int8)
    weight[1] = 127
    layer = Int8Linear(weight, torch.ones(2))
    got = layer(torch.full((1, terms), 127.0))
    assert got.double().tolist() == [[float(torch.tensor(-128 * 127.0 * terms)), float(torch.tensor(127.0**2 * terms))]]


@pytest.mark.native
@pytest.mark.parametrize("config", [Dynamic(), Static(), WeightOnly()], ids=lambda config: config.scheme)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_that_end_with_an_activation(activation: str, config: Any) -> None:
    linear, conv, x, image = nn.Linear(9, 6), nn.Conv2d(3, 4, 3), torch.randn(5, 9), torch.randn(2, 3, 6, 6)
    for kind, layer, input in ((Int8Linear, linear, x), (Int8Conv2d, conv, image)):
        plain, made = kind.from_float(layer, config), kind.from_float(layer, config, activation=activation)  # type: ignore[attr-defined]
        if isinstance(config, Static):
            plain.input_scale.fill_(0.02)
            made.input_scale.fill_(0.02)
        torch.testing.assert_close(made(input), ACTIVATIONS[activation](plain(input)), rtol=1e-5, atol=1e-6)
        assert copy.deepcopy(made).activation == activation
        assert (f"activation={activation}" in repr(made)) == (activation != "none")
        if activation != "none":
            with pytest.raises(ValueError, match=f"{kind.__name__}: activation must be 'none' in a layer that bec"):
                dequantize(nn.Sequential(made))
        with pytest.raises(ValueError, match=f"{kind.__name__}: activation must be one of none, relu, .*, got 'elu'"):
            kind.from_float(layer, config, activation="elu")  # type: ignore[attr-defined]
