"""The bench of two heads: what is counted, and that nothing wrong is timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import head, head_rivals, record, run
from bench.data import peaked_heads
from bench.gate import Wrong
from bench.head_gate import Gate
from bench.matmul import Matmul
from bench.measure import Case, Contender, Sample
from fastkd._rows import DIVERGENCES

SIZES = ["--vocab", "257", "--rows", "24", "--hidden", "16", "--teacher-hidden", "24"]
TINY = ["head", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", *SIZES]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """One thread: two that wait for each other on a busy machine take a scheduler's quantum for every loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arena_and_gate(divergence: str, soft_only: bool, dtype: torch.dtype = torch.float32) -> tuple[head.Arena, Gate]:
    heads = peaked_heads(24, 257, 16, 24, dtype=dtype, device=CPU)
    return head.Arena(heads), Gate(heads, soft_only, **head.options_of(divergence))


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    assert run.main([*TINY, "--providers", "eager", "fastkd", "fastkd-float32", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("head-*.csv")
    rows = record.read(path)
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, name) for mode in head.MODES for name in ("eager", "fastkd")
    ]
    figures = ("wall_ms", "cpu_ms", "least_gflop", "gflop_per_s", "matmul_gflop_per_s", "percent_of_matmul")
    for row in rows:
        assert all(float(row[column]) > 0 for column in figures)
        assert (row["rows"], row["vocab"], row["hidden"], row["teacher_hidden"]) == ("24", "257", "16", "24")
        assert (row["hard_term"], row["percent_of_copy"], row["percent_of_exp2"]) == ("yes", "", "")
    assert float(rows[0]["least_gflop"]) == pytest.approx(2 * 24 * 257 * (3 * 16 + 24) / 1e9, rel=1e-4)
    assert float(rows[-1]["least_gflop"]) == pytest.approx(2 * 24 * 257 * (2 * 16 + 24) / 1e9, rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_matmuls_are_those_of_the_problem(frozen: bool) -> None:
    heads = peaked_heads(24, 257, 16, 16, dtype=torch.float32, device=CPU)
    roof = Matmul((heads.input, heads.weight), (heads.teacher_input, heads.teacher_weight), frozen)
    assert roof.work == (6 if frozen else 8) * 24 * 16 * 257
    results = roof()
    stored = heads.teacher_input @ heads.teacher_weight.t()
    wanted = [stored @ heads.weight, stored.t() @ heads.input][: 1 if frozen else 2]
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_rate_is_operations_over_time() -> None:
    heads = peaked_heads(10, 100, 50, 50, dtype=torch.float32, device=CPU)
    roof = Matmul((heads.input, heads.weight), (heads.teacher_input, heads.teacher_weight), frozen=False)
    case = Case({}, [Contender("fastkd", tuple)], matmul=roof)
    (row,) = record.rows_of(case, {}, {"fastkd": [Sample(2e-3, None)] * 2}, {}, matmul=4e8)
    figures = [row[name] for name in ("least_gflop", "gflop_per_s", "matmul_gflop_per_s", "percent_of_matmul")]
    assert figures == ["0.0004", "0.2", "0.4", "50"]
    (row,) = record.rows_of(Case({}, case.contenders), {}, {"fastkd": [Sample(2e-3, None)] * 2}, {})
    assert {row[name] for name in ("least_gflop", "gflop_per_s", "matmul_gflop_per_s", "percent_of_matmul")} == {""}


@pytest.mark.parametrize("soft_only", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rivals_compute_the_same(divergence: str, soft_only: bool) -> None:
    arena, truth = arena_and_gate(divergence, soft_only)
    for mode in head.MODES:
        loss, *gradients = arena.runner(mode, head_rivals.eager(divergence, soft_only))()
        assert len(gradients) == (2 if mode == "forward+backward" else 1)
        truth.check_rival("eager", loss, gradients, arena.upstream)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no such function")
@pytest.mark.parametrize("soft_only", [False, True])
def test_torchs_own_has_the_gradient_of_forward_kl(soft_only: bool) -> None:
    for divergence in head_rivals.LINEAR_CROSS_ENTROPY_HAS:
        arena, truth = arena_and_gate(divergence, soft_only)
        loss, *gradients = arena.runner("forward+backward", head_rivals.linear_cross_entropy(soft_only))()
        truth.check_rival("x", None, gradients, arena.upstream)
        if divergence == "cross_entropy":
            truth.check_rival("x", loss, gradients, arena.upstream)
        else:  # which knows the teacher's entropy
            with pytest.raises(Wrong, match="x: loss is"):
                truth.check_rival("x", loss, gradients, arena.upstream)


WHAT = ("loss", "input gradient", "weight gradient")


def slightly_wrong(monkeypatch: pytest.MonkeyPatch, who: str, what: str) -> None:
    right = head._contender

    def off_by_a_hair(name: str, *arguments: object) -> Contender:
        contender = right(name, *arguments)

        def run() -> tuple[torch.Tensor, ...]:
            return tuple(x * 1.001 if part == what else x for part, x in zip(WHAT, contender.run(), strict=False))

        return Contender(name, run, contender.prepare, contender.impl) if name == who else contender

    monkeypatch.setattr(head, "_contender", off_by_a_hair)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("who", ["eager", "fastkd"])
def test_a_wrong_number_is_not_timed(
    who: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slightly_wrong(monkeypatch, who, what)
    assert run.main([*TINY, "--providers", "eager", "fastkd", "--out", str(tmp_path)]) == 1
    assert f"{who}: {what}" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no such function")
def test_a_wrong_number_of_others_leaves_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slightly_wrong(monkeypatch, "linear-cross-entropy", "weight gradient")
    words = [*TINY, "--mode", "forward+backward", "--out", str(tmp_path), "--providers"]
    assert run.main([*words, "linear-cross-entropy", "liger-fused", "fastkd"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "linear-cross-entropy did not run: linear-cross-entropy: weight gradient is off by" in said
    assert "liger-fused did not run: its kernels need a GPU" in said
    (path,) = tmp_path.iterdir()
    assert [row["provider"] for row in record.read(path)] == ["fastkd"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_rounded_on_their_way_pass_if_that_is_said(dtype: torch.dtype) -> None:
    """By as much as a GPU rounds them; four times what is allowed is an error still."""
    _, truth = arena_and_gate("forward_kl", soft_only=False, dtype=dtype)
    half = torch.finfo(dtype).eps / 2
    for error, passes in ((0.0, True), (half, True), (8 * half, False)):
        of_input, of_weight = truth.exact[1:3]
        gradients = [torch.zeros(24, 16, dtype=torch.float64), torch.zeros(257, 16, dtype=torch.float64)]
        gradients[0][truth.rows] = of_input + error * truth.exact.input_rounding / torch.finfo(dtype).eps
        gradients[1][truth.ids] = of_weight + error * truth.exact.weight_rounding / torch.finfo(dtype).eps
        arguments = "x", truth.exact.losses.mean(), gradients, 24, True
        if passes:
            truth.check(*arguments)
        else:
            with pytest.raises(Wrong, match="x: input gradient is"):
                truth.check(*arguments)
