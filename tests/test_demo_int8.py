"""The demo's networks as int8 layers, on sizes that take seconds."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from rich.console import Console

import fastkd
from fastkd.demo import digits, int8
from fastkd.demo.settings import DigitsSettings, Settings, TextSettings

TINY = Settings(
    seeds=(0,),
    digits=DigitsSettings(teacher_hidden=(64,), teacher_steps=60, teacher_lr=1e-2),
    text=TextSettings(
        vocabulary=600, source_files=4, window=16, batch=4, student_width=16, student_steps=5, evaluation_batches=2
    ),
)


def test_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "REPEAT", 1)
    rows = int8.run(TINY)
    assert [row.name for row in rows] == ["digits, linear", "digits, convolutions", "text, transformer"]
    for row in rows:
        assert row.sqnr > 25
        assert row.int8_bytes < 0.5 * row.float_bytes
        assert row.int8_score == pytest.approx(row.float_score, abs=2.0 if "accuracy" in row.metric else 0.05)
        assert all(time > 0 for times in (row.float_milliseconds, row.int8_milliseconds) for time in times.values())
    assert rows[0].float_score > 80
    console = Console(width=160, file=io.StringIO())
    int8.print_rows(console, rows)
    assert "transformer" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_network_is_copied_after_training() -> None:
    """Without its features, which belong to a graph."""
    data, model = digits.load(), digits.network((16,), seed=0)
    for _ in digits.train(model, digits.labels_loss(data), data, torch.arange(40), 2, 20, 1e-2, seed=0):
        pass
    assert model.features.grad_fn is not None
    copied = copy.deepcopy(model.eval())
    assert torch.equal(copied(data.test), model(data.test))
    fastkd.int8.quantize_(model)
    restored = fastkd.int8.dequantize(model)
    assert digits.accuracy(restored, data) == pytest.approx(digits.accuracy(copied, data), abs=3)
