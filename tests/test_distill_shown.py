"""What somebody who trains sees: the picture of a run and its progress bar."""

from __future__ import annotations

from pathlib import Path

import pytest
from distill_training import SGD, both, network, rows

from fastkd import kd_loss
from fastkd.distill import Distiller, Term, curves

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[str]] = {}
    panel = curves._panel

    def spy(axes: object, title: str, lines: list[tuple[str, curves.Rows]], val: curves.Rows) -> None:
        drawn[title] = [name for name, _ in lines]
        panel(axes, title, lines, val)

    monkeypatch.setattr(curves, "_panel", spy)
    result = both().fit(rows(), rows(8), epochs=3, batch_size=12, log_every=1, optimizer=SGD, out=tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert drawn["loss"] == ["loss", "loss"], "in training and evaluated"
    assert drawn["terms, before their weights"] == ["term/kd_loss", "term/hint_loss/1"]
    assert drawn["evaluation: accuracy"] == ["accuracy"]
    assert {"gradient norm", "learning rate"} <= drawn.keys()
    assert result.step == 6


@pytest.mark.filterwarnings("error")
def test_a_run_of_no_gradient_is_drawn(tmp_path: Path) -> None:
    one = Distiller(network(4), network(8, seed=9), [Term(kd_loss, weight=0.0)])
    one.fit(rows(), steps=2, log_every=1, optimizer=SGD, out=tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_counts_steps(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    both().fit(rows(), steps=4, log_every=1, optimizer=SGD, progress=progress)
    shown = capsys.readouterr().err
    assert ("4/4" in shown and "loss=" in shown) if progress else not shown
