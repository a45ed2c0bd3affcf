"""The bench of a teacher of k ids: its own formula in float64, which fastkd and eager code have to agree with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import kd, record, run, topk
from bench.measure import Contender
from fastkd import TopK

TINY = ["topk", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", "--vocab", "257"]
TINY += ["--rows", "8", "--k", "16"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    names = ["eager", "cross-entropy", "fastkd", "fastkd-overwrite"]
    assert run.main([*TINY, "--providers", *names, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("topk-*.csv")
    rows = record.read(path)
    assert [row["provider"] for row in rows] == [*names[:-1], *names]
    assert all(float(row["wall_ms"]) > 0 and row["k"] == "16" for row in rows)
    assert {float(row["least_mb"]) for row in rows} == {257 * 8 * 4 / 1e6, 3 * 257 * 8 * 4 / 1e6}


@pytest.mark.parametrize("divergence", topk.ON_LOG_PROBABILITIES)
def test_all_compute_the_same(divergence: str) -> None:
    arena = kd.Arena(8, 257, torch.float32, torch.device("cpu"))
    teacher = TopK.from_logits(arena.teacher, 16, temperature=topk.TEMPERATURE)
    truth = topk.Gate(arena, teacher, divergence)
    for mode in kd.MODES:
        for name in ("eager", "fastkd"):
            truth.check(topk._contender(name, arena, truth, mode, None))


@pytest.mark.parametrize("number", ["loss", "gradient"])
@pytest.mark.parametrize("who", ["eager", "fastkd", "fastkd-overwrite"])
def test_a_wrong_number_is_not_timed(
    who: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = topk._contender

    def off_by_a_hair(name: str, *arguments: object) -> Contender:
        contender = right(name, *arguments)

        def wrong() -> tuple[torch.Tensor, ...]:
            loss, *grad = contender.run()
            return (loss * 1.001, *grad) if number == "loss" else (loss, *(x * 1.001 for x in grad))

        return Contender(name, wrong, contender.prepare, contender.impl) if name == who else contender

    monkeypatch.setattr(topk, "_contender", off_by_a_hair)
    words = [*TINY, "--mode", "forward+backward", "--out", str(tmp_path)]
    assert run.main([*words, "--providers", "eager", "fastkd", "fastkd-overwrite"]) == 1
    assert f"{who}: {number}" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
