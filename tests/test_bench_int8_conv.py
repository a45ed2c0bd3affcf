"""The bench of int8 convolutions: all compute the same layer, each with its own error, and a wrong one is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import int8_conv, record, run
from bench.measure import Contender

SHAPE = "2,8,6,16,3,2,1"
TINY = ["int8_conv", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", "--shape", SHAPE]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    assert run.main([*TINY, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("int8_conv-*.csv")
    rows = {row["provider"]: row for row in record.read(path)}
    assert set(rows) <= set(int8_conv.PROVIDERS)
    assert {"eager", "eager-nchw", "bfloat16", "fastkd", "fastkd-static"} <= set(rows)
    errors = {name: float(row["error"]) for name, row in rows.items()}
    assert max(errors["eager"], errors["eager-nchw"]) < 1e-6 < 1e-3 < errors["bfloat16"] < errors["fastkd"] < 0.02
    assert {float(row["least_gflop"]) for row in rows.values()} == {2 * 2 * 3**2 * 16 * 8 * 9 / 1e9}


@pytest.mark.parametrize("shape", ["1,6,5,6,3,1,6", "2,8,7,4,3,1,2", "1,4,6,8,1,2,1"])
def test_all_compute_the_layer(shape: str) -> None:
    truth = int8_conv.Truth(int8_conv.Shape(*map(int, shape.split(","))))
    for name in int8_conv.PROVIDERS:
        truth.check(int8_conv.contender(name, truth, None))


@pytest.mark.parametrize("who", ["eager", "fastkd-static"])
def test_a_wrong_number_is_not_timed(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = int8_conv.contender

    def off(name: str, truth: int8_conv.Truth, impl: str | None) -> Contender:
        contender = right(name, truth, impl)
        if name != who:
            return contender
        (output,) = contender.run()
        return Contender(name, contender.run, error=truth.error(output * (1.1 if who == "eager" else 1.002)))

    monkeypatch.setattr(int8_conv, "contender", off)
    assert run.main([*TINY, "--out", str(tmp_path)]) == 1
    assert f"{who}: the error is" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
