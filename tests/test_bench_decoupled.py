"""The bench of the losses beside kd_loss: the published code and fastkd compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import decoupled, gate, kd, record, run

TINY = ["decoupled", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", "--vocab", "257"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    words = [*TINY, "--rows", "8", "--loss", "dkd", "--providers", "eager", "fastkd", "--out", str(tmp_path)]
    assert run.main(words) == 0
    (path,) = tmp_path.glob("decoupled-*.csv")
    rows = record.read(path)
    assert [(row["loss"], row["provider"]) for row in rows] == [("dkd", "eager"), ("dkd", "fastkd")] * 2
    assert all(float(row["wall_ms"]) > 0 for row in rows)


@pytest.mark.parametrize("loss", decoupled.LOSSES)
def test_all_compute_the_same(loss: str) -> None:
    arena = kd.Arena(8, 257, torch.float32, torch.device("cpu"))
    truth = decoupled.Gate(arena, loss)
    for mode in kd.MODES:
        for name in ("eager", "fastkd"):
            truth.check(decoupled._contender(name, arena, loss, mode, None))


@pytest.mark.parametrize("loss", decoupled.LOSSES)
def test_a_wrong_number_is_refused(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = kd.Arena(8, 257, torch.float32, torch.device("cpu"))
    truth = decoupled.Gate(arena, loss)
    op, published, ours = decoupled.LOSSES[loss]
    monkeypatch.setitem(
        decoupled.LOSSES, loss, (op, published, lambda *args, **options: 1.001 * ours(*args, **options))
    )
    with pytest.raises(gate.Wrong):
        truth.check(decoupled._contender("fastkd", arena, loss, "forward", None))
