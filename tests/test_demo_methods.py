"""Every way of distilling in the demo, on sizes that take seconds, and that its check can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastkd import demo
from fastkd.demo import digits, maps, methods
from fastkd.demo.methods_report import MethodsResult
from fastkd.demo.settings import DigitsSettings, Settings

TINY = Settings(
    seeds=(0, 1),
    digits=DigitsSettings(
        teacher_hidden=(16, 8),
        teacher_steps=20,
        student_steps=20,
        labels_per_class=1,
        methods=True,
        method_steps=4,
        map_steps=2,
        canvases=4,
    ),
)


def test_every_method_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(tmp_path, ("digits",), TINY)
    report, printed = json.loads((tmp_path / "demo.json").read_text())["methods"], capsys.readouterr().out
    assert list(report["connected"]) == list(methods.METHODS)
    for name, values in report["connected"].items():
        assert len(values) == 2
        assert name in printed
    for task in maps.UNITS:
        assert {name: len(values) for name, values in report[task].items()} == {
            "teacher": 1,
            **dict.fromkeys(maps.terms_of("", 1.0, 1.0), 2),
        }


def test_nothing_of_it_unless_asked_for(tmp_path: Path) -> None:
    demo.run(tmp_path, ("digits",), replace(TINY, seeds=(0,), digits=replace(TINY.digits, methods=False)))
    assert "methods" not in json.loads((tmp_path / "demo.json").read_text())


def test_the_best_has_to_be_clearly_better() -> None:
    plain = [90.0, 91.0, 92.0, 93.0]
    good, bad = [91.0, 92.5, 93.0, 94.0], [91.0, 90.5, 92.5, 93.25]
    assert MethodsResult({methods.PLAIN: plain, methods.BEST: good}).problem() is None
    problem = MethodsResult({methods.PLAIN: plain, methods.BEST: bad}).problem()
    assert problem is not None
    assert "gains 0.31 points on plain KD, not two standard errors of 0.31" in problem


def test_canvases_say_whose_ink_it_is() -> None:
    data = digits.load()
    pixels, classes = maps.canvases(data.train, data.train_target, 5, seed=0).tensors
    assert pixels.shape == (5, 1, maps.SIDE, maps.SIDE)
    assert torch.equal(classes == maps.BACKGROUND, pixels[:, 0] == 0)
    assert torch.equal(classes, maps.canvases(data.train, data.train_target, 5, seed=0).tensors[1])
    one = maps.canvases(data.train[:1], data.train_target[:1], 2, seed=0).tensors[1]
    assert set(one.unique().tolist()) == {int(data.train_target[0]), maps.BACKGROUND}


def test_intersection_over_union() -> None:
    classes = torch.tensor([[[0, 0], [1, maps.BACKGROUND]]])
    data = torch.utils.data.TensorDataset(torch.zeros(1, 1, 2, 2), classes)

    class Guess(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([[[0, 1], [1, 3]]]), 11).permute(0, 3, 1, 2).float()

    assert maps.mean_intersection(Guess(), data) == pytest.approx(100 * (1 / 2 + 1 / 2) / 11)
