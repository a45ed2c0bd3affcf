"""The demo's networks as int8 layers, on sizes that take seconds."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from fastkd import demo
from fastkd.demo import corpus, int8, text
from fastkd.demo.language_model import LanguageModel, rounded
from fastkd.demo.settings import DigitsSettings, Settings, TextSettings

TINY = Settings(
    seeds=(0,),
    digits=DigitsSettings(teacher_hidden=(64,), teacher_steps=60, teacher_lr=1e-2),
    text=TextSettings(
        vocabulary=600,
        source_files=4,
        window=16,
        batch=4,
        teacher_width=16,
        student_width=16,
        teacher_steps=4,
        student_steps=5,
        evaluation_batches=2,
    ),
)


def test_small_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As part of a run: in the table, the file and the picture."""
    monkeypatch.setattr(int8, "REPEAT", 1)
    settings = replace(TINY, seeds=(0, 1), text=replace(TINY.text, int8=True), int8=True)
    assert demo.run(tmp_path, ("text",), settings) == 0
    report = json.loads((tmp_path / "demo.json").read_text())
    assert list(report["int8"]) == ["text, transformer"]
    (row,) = report["int8"].values()
    assert len(row["sqnr"]) == len(row["int8_score"]) == 2
    assert row["mean_and_spread"]["change"][0] == pytest.approx(
        statistics.fmean(row["int8_score"]) - statistics.fmean(row["float_score"])
    )
    assert row["int8_score"] == pytest.approx(row["float_score"], abs=0.05)
    assert set(row["int8_milliseconds"]) == {"1", "32"}
    part, printed = report["text"], " ".join(capsys.readouterr().out.split())
    assert 0 < part["int8_difference"] < 0.01
    assert part["held_out"]["student_int8"] == pytest.approx(part["held_out"]["student_fastkd"], rel=1e-2)
    assert part["held_out"]["teacher_int8"] != part["held_out"]["teacher"]
    assert part["int8_ratio"]["step_milliseconds"] > 0
    for words in ("The same networks with int8 layers", "eager / int8 teacher", "teacher with int8 layers", "±"):
        assert words in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_networks_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "REPEAT", 1)
    with Progress(disable=True) as progress:
        rows = int8.run(TINY, ("digits",), progress)
    assert [row.name for row in rows] == ["digits, linear", "digits, convolutions"]
    for row in rows:
        assert row.sqnr[0] > 25
        assert row.int8_bytes < 0.5 * row.float_bytes
        assert row.int8_score[0] == pytest.approx(row.float_score[0], abs=2.0)
        assert row.means()["change"] == (row.int8_score[0] - row.float_score[0], 0.0)
        assert all(time > 0 for times in (row.float_milliseconds, row.int8_milliseconds) for time in times.values())
    assert rows[0].float_score[0] > 80


def test_an_int8_teacher_teaches_what_its_own_layers_give() -> None:
    tokens = torch.arange(20).repeat(40)
    settings = replace(TINY.text, vocabulary=20)
    repeating = corpus.Corpus(vocabulary=20, train=tokens, held_out=tokens)
    teacher, student = (LanguageModel(repeating.log_frequency(), settings.window, width) for width in (16, 8))
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter)
    way = text.RoundedHeads(text.heads_loss(settings), rounded(teacher))
    inputs, target = corpus.draw(tokens, settings.batch, settings.window, torch.Generator().manual_seed(0))
    got, seconds = way.backward(student, teacher, inputs, target)
    assert seconds > 0
    with torch.no_grad():
        want = text.eager_loss(settings)(student(inputs), way.teacher(inputs), target)
        plain = text.eager_loss(settings)(student(inputs), teacher(inputs), target)
    torch.testing.assert_close(got, want)
    assert 1e-5 < float((got - plain).abs() / plain) < 0.05
    assert student.token.weight.grad is not None
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
