"""The bench of attention distillation: its own formula in float64, which fastkd and eager code have to agree with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastkd
from bench import attention, gpu_attention_checks, kd, record, run
from bench.gate import Wrong
from bench.measure import Contender

TINY = ["attention", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", "--tokens", "37"]
TINY += ["--heads", "2", "--dim", "16"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    names = ["eager", "fastkd"]
    assert run.main([*TINY, "--providers", *names, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("attention-*.csv")
    rows = record.read(path)
    assert [row["provider"] for row in rows] == names * 4
    assert [row["causal"] for row in rows] == ["no"] * 4 + ["yes"] * 4
    assert all(float(row["wall_ms"]) > 0 and row["tokens"] == "37" and row["dim"] == "16" for row in rows)
    forward = 2 * 2 * 2 * 37 * 37 * 16 / 1e9
    assert float(rows[0]["least_gflop"]) == pytest.approx(forward, rel=0.01)
    assert float(rows[2]["least_gflop"]) == pytest.approx(2 * forward, rel=0.01)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_compute_the_same(dtype: torch.dtype, causal: bool) -> None:
    arena = attention.arena(2, 37, 2, 16, causal, dtype, torch.device("cpu"))
    truth = attention.Gate(arena)
    for mode in kd.MODES:
        for name in ("eager", "fastkd"):
            truth.check(attention._contender(name, arena, mode, None))


def test_the_products_are_those_of_the_scores_that_are_seen() -> None:
    for causal, pairs in ((False, 1100 * 1100), (True, 512 * 512 + 512 * 1024 + 76 * 1100)):
        arena = attention.arena(1, 1100, 1, 16, causal, torch.float32, torch.device("cpu"))
        products = attention.Products(arena, "forward+backward")
        assert products.work == 8 * pairs * 16
        products()
        keys = arena.keys[0, 0].detach()
        last = slice(*products.blocks[-1][:2])
        scores = arena.queries[0, 0, last].detach() @ keys.t()
        torch.testing.assert_close(products.of_queries[last], scores @ keys, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("number", ["loss", "gradient", "gradient of keys"])
@pytest.mark.parametrize("who", ["eager", "fastkd"])
def test_a_wrong_number_is_not_timed(
    who: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention._contender

    def off_by_a_hair(name: str, *arguments: object) -> Contender:
        contender = right(name, *arguments)

        def wrong() -> tuple[torch.Tensor, ...]:
            results = list(contender.run())
            results[["loss", "gradient", "gradient of keys"].index(number)] *= 1.001
            return tuple(results)

        return Contender(name, wrong, contender.prepare, contender.impl) if name == who else contender

    monkeypatch.setattr(attention, "_contender", off_by_a_hair)
    words = [*TINY, "--mode", "forward+backward", "--out", str(tmp_path)]
    assert run.main([*words, "--providers", "eager", "fastkd"]) == 1
    assert f"{who}: {number}" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_checks_for_a_gpu_pass_and_see_an_error(dtype: torch.dtype) -> None:
    gpu_attention_checks.numbers("cpu", dtype, fastkd.attention_kl_loss)
    gpu_attention_checks.step_on("cpu", fastkd.attention_kl_loss)()

    def wrong(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        return fastkd.attention_kl_loss(*tensors, **options) * 1.02

    with pytest.raises(Wrong, match=r"loss is off by 2\.0e-02 of its norm"):
        gpu_attention_checks.numbers("cpu", dtype, wrong)
