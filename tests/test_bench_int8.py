"""The bench of int8 layers: who takes part, what their errors are, and that a wrong number is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import int8, int8_rivals, providers, record, run
from bench.measure import Contender

TINY = ["int8", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", "--shape", "3,64,32"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    names = ["eager", "bfloat16", "fastkd"]
    assert run.main([*TINY, "--providers", *names, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("int8-*.csv")
    rows = {row["provider"]: row for row in record.read(path)}
    assert list(rows) == names
    assert all(float(row["wall_ms"]) > 0 and row["columns"] == "32" for row in rows.values())
    errors = [float(rows[name]["error"]) for name in names]
    assert errors[0] < 1e-6 < 1e-3 < errors[1] < errors[2] < 0.02
    assert {float(row["least_gflop"]) for row in rows.values()} == {2 * 3 * 64 * 32 / 1e9}


def test_who_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    truth = int8.Truth(nn.Linear(8, 4).requires_grad_(False), torch.randn(2, 8))
    rivals = ("torchao", "torchao-compiled", "quanto", "bitsandbytes")
    contenders, absent = int8.able(rivals, lambda name: int8.contender(name, truth, None), truth.check)
    assert contenders == []
    packages = ("torchao", "torchao", "optimum", "bitsandbytes")
    assert list(absent.values()) == [f"{package} is not installed" for package in packages]


@pytest.mark.parametrize("who", ["eager", "fastkd"])
def test_a_wrong_number_is_not_timed(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = int8.contender

    def off(name: str, truth: int8.Truth, impl: str | None) -> Contender:
        contender = right(name, truth, impl)
        if name != who:
            return contender
        (output,) = contender.run()
        return Contender(name, contender.run, error=truth.error(output * (1.1 if who == "eager" else 1.002)))

    monkeypatch.setattr(int8, "contender", off)
    assert run.main([*TINY, "--providers", "eager", "fastkd", "--out", str(tmp_path)]) == 1
    assert f"{who}: the error is" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_the_roof_counts_every_product() -> None:
    roof = int8.Registers(10**7)
    made = 2 * roof.peak(roof.rounds, 1)
    assert abs(made - roof.work) <= 0.01 * roof.work


def test_rivals_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU, which has the same product of int8 matrices."""
    layer, input = nn.Linear(64, 32).requires_grad_(False), torch.randn(20, 64).bfloat16()
    truth = int8.Truth(layer, input)
    error = truth.error(int8_rivals.int_mm(layer, input)(input))
    assert abs(error - truth.least) < 0.02 * truth.least
    product = int8.Product(20, 64, 32, torch.device("cpu"))
    assert product()[0].shape == (20, 32)
    assert product.work == 2 * 20 * 64 * 32

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("self.size(0) needs to be greater than 16\nand more")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with pytest.raises(int8.Unavailable, match=r"^self\.size\(0\) needs to be greater than 16$"):
        int8_rivals.int_mm(layer, input)


def test_who_is_measured_where() -> None:
    truth = int8.Truth(nn.Linear(8, 4).requires_grad_(False), torch.randn(2, 8))
    for name in ("int-mm", "int-mm-compiled"):
        with pytest.raises(int8.Unavailable, match=r"^it is not measured on cpu$"):
            int8.contender(name, truth, None)
    assert int8.contender("bfloat16", truth, None).error < 0.05
