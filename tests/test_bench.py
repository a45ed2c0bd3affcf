"""The benches: nothing wrong is timed, and rows say where they come from."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fastkd
from bench import eager, exponentials, kd, measure, memory, record, run, screen
from bench.measure import Case, Contender, Sample
from fastkd import _dispatch

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234"]
PROBLEM = ["--vocab", "257", "--rows", "8"]
FIGURES = ("wall_ms", "wall_p20_ms", "wall_p80_ms", "cpu_ms", "gb_per_s", "copy_gb_per_s", "percent_of_copy")
FIGURES += ("least_mexp", "gexp_per_s", "exp2_gexp_per_s", "percent_of_exp2")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """One thread: two that wait for each other on a busy machine take a scheduler's quantum for every loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of_run(folder: Path, *arguments: str) -> list[dict[str, str]]:
    assert run.main([*arguments, "--out", str(folder)]) == 0
    (path,) = folder.glob("*.csv")
    return record.read(path)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    rows = rows_of_run(tmp_path, "kd", *TINY, *PROBLEM, "--providers", "eager", "fastkd", "fastkd-overwrite")
    assert [(row["mode"], row["provider"]) for row in rows] == [
        ("forward", "eager"),
        ("forward", "fastkd"),
        ("forward+backward", "eager"),
        ("forward+backward", "fastkd"),
        ("forward+backward", "fastkd-overwrite"),
    ]
    for row in rows:
        assert all(float(row[column]) > 0 for column in FIGURES)
        assert row["commit"] == "abc1234"
        assert row["command"].startswith("python bench/run.py kd --device cpu")
        assert str(tmp_path) not in row["command"]
        assert (row["rows"], row["vocab"], row["dtype"], row["rounds"]) == ("8", "257", "float32", "2")
        assert row["impl"] == ("" if row["provider"] == "eager" else row["impl"])
    assert float(rows[0]["times_eager"]) == 1
    again = rows_of_run(tmp_path, "kd", *TINY, *PROBLEM, "--providers", "fastkd", "--mode", "forward")
    assert again[: len(rows)] == rows
    assert len(again) == len(rows) + 1
    assert again[-1]["times_eager"] == ""


def test_the_price_of_one_call(tmp_path: Path) -> None:
    rows = rows_of_run(tmp_path, "call", *TINY, "--calls", "2", "--providers", "eager", "fastkd")
    assert [row["provider"] for row in rows] == ["eager", "fastkd"]
    assert all(float(row["wall_ms"]) > 0 and row["percent_of_copy"] == row["percent_of_exp2"] == "" for row in rows)


@pytest.mark.slow
def test_compiled_code_is_a_rival(tmp_path: Path) -> None:
    """In its own process: what the other tests patch is no business of the compiler's."""
    words = ["kd", *TINY, *PROBLEM, "--mode", "forward+backward", "--providers", "eager", "compiled", "fastkd"]
    subprocess.run([sys.executable, "bench/run.py", *words, "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    (path,) = tmp_path.glob("*.csv")
    assert all(float(row["times_compiled"]) > 0 for row in record.read(path))


@pytest.mark.parametrize("divergence", kd.DIVERGENCES)
def test_rivals_compute_the_same(divergence: str) -> None:
    arena = kd.Arena(8, 257, torch.float32, torch.device("cpu"))
    truth = kd.Gate(arena, divergence)
    for mode in kd.MODES:
        truth.check(Contender("eager", arena.runner(mode, eager.eager(divergence)), arena.restore))


@pytest.mark.parametrize(
    ("who", "mode", "number"),
    [
        ("eager", "forward", "loss"),
        ("fastkd", "forward", "loss"),
        *[(who, "forward+backward", number) for who in ("eager", *kd.OURS) for number in ("loss", "gradient")],
    ],
)
def test_a_wrong_number_is_not_timed(
    who: str,
    mode: str,
    number: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = kd._contender

    def off_by_a_hair(name: str, *arguments: object) -> Contender:
        contender = right(name, *arguments)
        if name != who:
            return contender

        def run() -> tuple[torch.Tensor, ...]:
            loss, *grad = contender.run()
            if number == "loss":
                return loss * 1.001, *grad
            return loss, *(x * 1.001 for x in grad)

        return Contender(name, run, contender.prepare, contender.impl)

    monkeypatch.setattr(kd, "_contender", off_by_a_hair)
    words = ["kd", *TINY, *PROBLEM, "--mode", mode, "--out", str(tmp_path)]
    assert run.main([*words, "--providers", "eager", "fastkd", "fastkd-overwrite"]) == 1
    assert f"{who}: {number}" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_who_cannot_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch._choose.cache_clear()  # a choice is remembered, and this is about another environment
    words = ["kd", *TINY, *PROBLEM, "--mode", "forward", "--impl", "triton", "--out", str(tmp_path)]
    assert run.main([*words, "--providers", "eager", "liger", "fastkd"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "liger did not run: its kernels need a GPU" in said
    assert "fastkd did not run: kd_loss: impl='triton' cannot run here" in said
    assert "could not run, see above: fastkd, liger" in said


def test_everybody_runs_once_a_round_in_changing_order() -> None:
    ran: list[str] = []
    contenders = [Contender(name, lambda: (), lambda name=name: ran.append(name)) for name in "abc"]
    clock = measure.HostClock(torch.device("cpu"), calls=2)
    samples = measure.interleave(contenders, clock, 4)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = ["".join(ran[i : i + 3]) for i in range(3 * measure.WARM_UPS, len(ran), 3)]
    assert rounds == ["abc", "acb", "cab", "cba"]


@pytest.mark.parametrize(("calls", "runs"), [(1, 1), (2, 3), (5, 6)])
def test_readings_of_several_calls_begin_with_one_that_is_not_timed(
    calls: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[float] = []
    clock, now = measure.HostClock(torch.device("cpu"), calls), iter([10.0, 10.0 + 6 * calls])
    contender = Contender("a", lambda: (ran.append(0.0), ())[1])
    stopwatch = SimpleNamespace(perf_counter=lambda: ran.append(1.0) or next(now), process_time=lambda: 0.0)
    monkeypatch.setattr(measure, "time", stopwatch)
    assert clock.time(contender).wall == 6.0
    assert (ran.count(0.0), ran.index(1.0)) == (runs, runs - calls), "runs in all, and before the clock"


def test_figures_are_of_the_samples() -> None:
    assert measure.figures([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert measure.figures([2.0]) == (2.0, 2.0, 2.0)


def test_least_bytes_are_counted_by_hand() -> None:
    arena = kd.Arena(4, 100, torch.bfloat16, torch.device("cpu"))
    assert kd.least_bytes(arena, "forward") == 2 * 400 * 2
    assert kd.least_bytes(arena, "forward+backward") == 5 * 400 * 2


def test_least_exponentials_are_counted_by_hand() -> None:
    """p and q for the normalisers, what the value needs of them, and again for the gradient; a logarithm is one too."""
    want = {
        "forward_kl": (2, 2 + 2),
        "cross_entropy": (2, 2 + 2),
        "reverse_kl": (2 + 1, 3 + 1),
        "tvd": (2 + 2, 4 + 2),
        "jsd": (2 + 3, 5 + 3),
        "skew_kl": (2 + 3, 5 + 2),
        "skew_reverse_kl": (2 + 3, 5 + 3),
        "mse": (1, 1 + 1),
    }
    assert set(want) == set(kd.DIVERGENCES)
    for divergence, counts in want.items():
        assert tuple(exponentials.least_exponentials(divergence, mode, 10) for mode in kd.MODES) == (
            10 * counts[0],
            10 * counts[1],
        )


def test_the_machines_exponentials_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = exponentials.Exponentials(torch.device("cpu"))
    computed: list[int] = []
    right = torch.exp2

    def counted(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        computed.append(out.numel())
        return right(x, out=out)

    monkeypatch.setattr(torch, "exp2", counted)
    (results,) = one()
    assert one.work == sum(computed)
    assert len(computed) > 10
    assert results.abs().max() == 1
    # Both buffers of a thread fit into caches, so that no memory is measured.
    assert 2 * results.nbytes <= 2**20 * torch.get_num_threads()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for the CPU")
def test_chains_of_exponentials_are_as_long_as_they_say() -> None:
    pytest.importorskip("triton")
    from bench.exponential_chains import exponential_chains

    first = torch.arange(2048) * 1e-9
    got = exponential_chains(torch.zeros(2048), 16)
    for _ in range(16):
        first = torch.exp2(-first)
    torch.testing.assert_close(got, first, rtol=1e-6, atol=0)
    assert exponential_chains(got, 64).tolist() == pytest.approx([0.6411857] * 2048)


def test_a_rate_is_bytes_over_time() -> None:
    who = [Contender("eager", tuple), Contender("fastkd", tuple)]
    case = Case({"vocab": 8}, who, least_bytes=3 * 10**9, least_exponentials=10**9)
    samples = {"eager": [Sample(3.0, 6.0)] * 2, "fastkd": [Sample(1.0, 1.5)] * 2}
    slow, fast = record.rows_of(case, {}, samples, {}, copy=6e9, exp2=4e9)
    assert (slow["gb_per_s"], slow["percent_of_copy"], fast["percent_of_copy"]) == ("1", "16.667", "50")
    assert (slow["least_mexp"], slow["exp2_gexp_per_s"]) == ("1000", "4")
    assert (slow["gexp_per_s"], slow["percent_of_exp2"], fast["percent_of_exp2"]) == ("0.33333", "8.3333", "25")
    (unknown, _) = record.rows_of(Case({}, who, least_bytes=8), {}, samples, {}, copy=6e9)
    assert unknown["percent_of_copy"]
    assert [unknown[name] for name in ("least_mexp", "gexp_per_s", "exp2_gexp_per_s", "percent_of_exp2")] == [""] * 4
    assert (fast["times_eager"], fast["cpu_times_eager"], fast["times_compiled"]) == ("3", "4", "")


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the platform does not tell the peak of resident memory")
def test_memory_is_beside_inputs_and_results() -> None:
    mib = 2**20
    held = torch.ones(8 * mib)

    def take() -> tuple[torch.Tensor, ...]:
        scratch = torch.ones(16 * mib)
        return held.add_(1), scratch[: 4 * mib] * 2

    peak = memory.peak(Contender("x", take), torch.device("cpu"), [held])
    assert peak is not None
    assert peak.beside_inputs / mib == pytest.approx(80, abs=4)
    assert peak.beside_results / mib == pytest.approx(64, abs=4)


def test_a_file_keeps_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "kd-x.csv"
    record.append(path, [{"a": 1, "b": "x, y"}])
    record.append(path, [{"a": 2, "b": ""}])
    assert record.read(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    with pytest.raises(ValueError, match="has other columns"):
        record.append(path, [{"a": 1, "c": 2}])
    record.append(path, [{"a": 3, "new": 5, "b": "z"}])
    assert path.read_text().splitlines()[0] == "a,new,b"
    assert record.read(path) == [
        {"a": "1", "new": "", "b": "x, y"},
        {"a": "2", "new": "", "b": ""},
        {"a": "3", "new": "5", "b": "z"},
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_warns_of_times_that_spread_widely(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case({"vocab": 8}, [Contender("eager", tuple), Contender("fastkd", tuple)])
    samples = {"eager": [Sample(x, 1.0) for x in (0.5, 0.5, 1.4, 1.4)], "fastkd": [Sample(1.0, 1.0)] * 4}
    screen.show(Console(width=160), case, record.rows_of(case, {}, samples, {}))
    said = capsys.readouterr().out
    assert "eager spreads widely (p20 500 to p80 1400 ms): run it again" in said
    assert said.count("spreads widely") == 1


def test_a_commit_is_dirty_if_the_code_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bench writes, and files that git does not know, do not count."""

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ("git", *identity, *words)
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    files = ("fastkd/__init__.py", "csrc/a.cpp", "README.md", "bench/results/kd.csv")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as committed")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record._commit() == "unknown"  # fastkd is not from there
    monkeypatch.setattr(fastkd, "__file__", str(tmp_path / "fastkd" / "__init__.py"))
    clean = git("rev-parse", "--short", "HEAD")
    assert record._commit() == clean
    (tmp_path / "untracked").write_text("")
    for name in files:
        (tmp_path / name).write_text("changed")
        assert record._commit() == clean + ("-dirty" if name.startswith(("fastkd", "csrc")) else "")
        git("checkout", "-q", "--", name)


@pytest.mark.parametrize("absent", [("psutil",), ("rich", "tqdm")])
def test_what_a_run_needs_is_named_with_its_extra(absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"needs {', '.join(absent)}: pip install 'fastkd\[bench\]' brings it"):
        runpy.run_path(str(ROOT / "bench" / "run.py"))
