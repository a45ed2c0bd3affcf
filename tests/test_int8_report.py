"""The report on a quantised model: its numbers against the same numbers by hand."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from int8_models import ConvNet, Transformer, ids, images, sqnr
from torch import Tensor, nn

from fastkd.int8 import Dynamic, Report, Static, quantize_, report


def reported() -> tuple[nn.Module, nn.Module, Tensor, Report]:
    model, x = ConvNet(), images()
    float_model = copy.deepcopy(model)
    quantize_(model, Dynamic(skip="branch"))
    return model, float_model, x, report(model, float_model, (x,), repeat=2)


def test_numbers() -> None:
    model, float_model, x, found = reported()
    layers = {layer.name: layer for layer in found.layers}
    assert {name: layer.scheme for name, layer in layers.items()} == {
        "stem": "dynamic",
        "branch": "float",
        "last": "dynamic",
        "head": "dynamic",
    }
    with torch.no_grad():
        # The norm is part of the stem, which has no layers before it.
        stem = float_model.stem_norm(float_model.stem(x))
        assert layers["stem"].own_sqnr == pytest.approx(sqnr(model.stem(x), stem), rel=1e-6)
        assert layers["stem"].sqnr == layers["stem"].own_sqnr
        got, want = model(x), float_model(x)
        assert found.sqnr == pytest.approx(sqnr(got, want), rel=1e-6)
        assert layers["head"].sqnr == pytest.approx(found.sqnr, rel=1e-6)
        cosine = nn.functional.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0)
        assert found.cosine == pytest.approx(float(cosine), rel=1e-9)
        assert found.top1 == pytest.approx(float((got.argmax(-1) == want.argmax(-1)).double().mean()))
    # Float, but after layers that are not.
    assert layers["branch"].own_sqnr == math.inf
    assert layers["branch"].sqnr is not None
    assert 20 < layers["branch"].sqnr < 100
    assert layers["last"].own_sqnr > layers["last"].sqnr
    stem_bytes = 8 * 27 + 2 * 4 * 8
    assert layers["stem"].bytes == stem_bytes
    assert layers["stem"].float_bytes == 4 * (8 * 27 + 4 * 8) + 8
    assert found.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert found.float_bytes == sum(t.numel() * t.element_size() for t in float_model.state_dict().values())
    assert all(layer.milliseconds > 0 and layer.float_milliseconds > 0 for layer in found.layers)
    assert found.milliseconds is not None
    assert found.float_milliseconds is not None
    assert not model.stem._forward_hooks
    assert not float_model.stem._forward_hooks


def test_what_is_called_twice_or_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=self.layer(x).relu_())
            return y

    model, x = Twice().eval(), torch.randn(5, 4)
    float_model = copy.deepcopy(model)
    quantize_(model)
    found = report(model, float_model, x, repeat=0)
    layer, unused = found.layers
    assert (unused.own_sqnr, unused.sqnr, unused.cosine, unused.milliseconds) == (None, None, None, None)
    with torch.no_grad():
        first = float_model.layer(x)
        want = torch.cat([first, float_model.layer(first.relu())])
        own = torch.cat([model.layer(x), model.layer(first.relu())])
        first_int8 = model.layer(x)
        within = torch.cat([first_int8, model.layer(first_int8.relu())])
    assert layer.own_sqnr == pytest.approx(sqnr(own, want), rel=1e-6)
    assert layer.sqnr == pytest.approx(sqnr(within, want), rel=1e-6)
    assert found.milliseconds is None


def test_shared_weights_count_once() -> None:
    model, x = Transformer(depth=1), ids()
    float_model = copy.deepcopy(model)
    quantize_(model)
    found = report(model, float_model, {"ids": x}, repeat=0)
    assert found.float_bytes == 4 * sum(parameter.numel() for parameter in float_model.parameters())
    assert found.float_bytes / found.bytes > 2.5
    assert {layer.name for layer in found.layers} >= {"embed", "head"}


def test_tables_and_files(tmp_path: Path) -> None:
    from rich.console import Console

    *_, found = reported()
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert [line.split()[0] for line in lines[1:]] == ["stem", "branch", "last", "head", "model"]
    assert "top-1" in lines[-1]
    found.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["stem", "branch", "last", "head"]
    assert float(rows[0]["own_sqnr"]) == found.layers[0].own_sqnr
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["layers"][0]["name"] == "stem"
    console = Console(width=200, file=io.StringIO())
    console.print(found)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "own SQNR dB" in text
    assert "stem" in text


def test_the_root() -> None:
    model = nn.Linear(64, 8).eval()
    float_model = copy.deepcopy(model)
    quantize_(model, Static(), example=torch.randn(3, 64))
    found = report(model, float_model, torch.randn(3, 64), repeat=0)
    assert [layer.name for layer in found.layers] == [""]
    assert "(root)" in str(found)


def test_refused() -> None:
    model, float_model, x, _ = reported()
    with pytest.raises(ValueError, match=r"report: model must be in evaluation mode \(call eval\(\)\)"):
        report(copy.deepcopy(model).train(), float_model, x)
    with pytest.raises(ValueError, match="report: float_model must have the layers of model, got none called stem"):
        report(model, nn.Linear(4, 4).eval(), x)
    with pytest.raises(TypeError, match=r"report: float_model must be a torch\.nn\.Module, got int"):
        report(model, 3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="report: repeat must be an integer, 0 or more, got -1"):
        report(model, float_model, x, repeat=-1)


def test_agreement() -> None:
    """Of several tensors together, in any dtype, more numbers than are looked at at a time, and of nothing."""
    from fastkd.int8 import agreement

    found, parts = agreement.Agreement(), []
    for n, dtype in ((agreement.CHUNK + 7, torch.float32), (10, torch.bfloat16), (0, torch.float32)):
        want = torch.randn(n).to(dtype)
        got = want.float() + 0.01 * torch.randn(n)
        found.add(got, want)
        parts.append((got.double(), want.double()))
    got, want = (torch.cat(column) for column in zip(*parts, strict=True))
    assert found.sqnr() == pytest.approx(sqnr(got, want), rel=1e-9)
    assert found.cosine() == pytest.approx(float(got @ want / (got.norm() * want.norm())), rel=1e-12)
    silent = agreement.Agreement()
    silent.add(torch.zeros(3), torch.zeros(3))
    assert (silent.sqnr(), silent.cosine()) == (math.inf, 1.0)
    silent.add(torch.ones(3), torch.zeros(3))
    assert (silent.sqnr(), silent.cosine()) == (-math.inf, 0.0)
    silent.add(torch.full((3,), torch.nan), torch.ones(3))
    assert math.isnan(silent.sqnr())
