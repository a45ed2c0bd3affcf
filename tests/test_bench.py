"""The benches: nothing wrong is timed, rows say where they come from, and README.md says what the rows say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import eager, exponentials, kd, measure, memory, readme, record, run
from bench.measure import Case, Contender, Sample

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


def sample_row(provider: str, vocab: int, milliseconds: float, date: str = "2030-01-01T00:00:00+00:00") -> record.Row:
    return {
        "date": date,
        "commit": "abc1234",
        "machine": "Abacus 9",
        "device": "cpu",
        "threads": 2,
        "isa": "beads",
        "torch": "2.13.0",
        "command": "python bench/run.py kd",
        "divergence": "forward_kl",
        "mode": "forward+backward",
        "dtype": "float32",
        "rows": 512,
        "vocab": vocab,
        "provider": provider,
        "impl": "native" if provider == "fastkd" else "",
        "wall_ms": milliseconds,
        "times_eager": 600 / milliseconds,
        "percent_of_copy": 80,
        "copy_gb_per_s": 20,
        "percent_of_exp2": 60,
        "exp2_gexp_per_s": 9,
        "extra_mib": 300 if provider == "eager" else 0,
    }


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with a README and the rows of two runs."""
    results = tmp_path / "results"
    for vocab in (50257, 128256):
        record.append(results / "kd-abacus-9.csv", [sample_row("eager", vocab, 600), sample_row("fastkd", vocab, 60)])
    call = [{**sample_row("eager", 10, 0.1), "rows": 8}, {**sample_row("fastkd", 10, 0.04), "rows": 8}]
    record.append(results / "call-abacus-9.csv", call)
    (tmp_path / "README.md").write_text(f"# before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    return tmp_path


def write_readme(house: Path, *more: str) -> int:
    return readme.main(["--readme", str(house / "README.md"), "--results", str(house / "results"), *more])


def test_readme_is_written_from_the_rows(house: Path) -> None:
    assert write_readme(house, "--check") == 1
    assert "old" in (house / "README.md").read_text()
    assert write_readme(house) == 0
    text = (house / "README.md").read_text()
    assert text.startswith("# before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| `forward_kl` | 512 x 50,257 float32 | 600 ms | 60 ms (10.0x) | 80 % | 0 MiB (eager 300) |" in text
    for said in ("Abacus 9, 2 threads", "abc1234", "`python bench/run.py kd`", "40.0 us, 0.40 of eager's 0.1 ms"):
        assert said in text
    assert "at the rate of `copy_` (20 GB/s)" in text
    assert "at the rate of `exp2` in cache (9 G/s)" in text
    assert (house / "results" / "kd.png").stat().st_size > 5000
    assert write_readme(house, "--check") == 0


@pytest.mark.parametrize(("copy", "exp2", "said"), [(30, 70, "70 %"), (70, 30, "70 %"), (70, "", "-"), ("", 70, "-")])
def test_readme_says_how_close_to_the_higher_floor(house: Path, copy: object, exp2: object, said: str) -> None:
    rows = [
        sample_row("eager", 7, 600),
        sample_row("fastkd", 7, 60) | {"percent_of_copy": copy, "percent_of_exp2": exp2},
    ]
    record.append(house / "results" / "kd-abacus-9.csv", rows)
    write_readme(house)
    assert (
        f"| 60 ms (10.0x) | {said} | 0 MiB" in (house / "README.md").read_text().split("x 7 float32")[1].split("\n")[0]
    )


def test_readme_of_rows_from_before_there_was_a_floor(house: Path) -> None:
    path = house / "results" / "kd-abacus-9.csv"
    rows = [{k: v for k, v in row.items() if "exp2" not in k} for row in record.read(path)]
    path.unlink()
    record.append(path, rows)
    write_readme(house)
    text = (house / "README.md").read_text()
    assert text.count("| 60 ms (10.0x) | - | 0 MiB") == 2
    assert "`exp2` in cache (not measured)" in text


def test_readme_drifts_from_newer_rows(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_readme(house)
    newer = [sample_row("eager", 50257, 600, "2030-01-02"), sample_row("fastkd", 50257, 50, "2030-01-02")]
    record.append(house / "results" / "kd-abacus-9.csv", newer)
    assert write_readme(house, "--check") == 1
    assert "run `python bench/readme.py`" in capsys.readouterr().out
    write_readme(house)
    text = (house / "README.md").read_text()
    assert "50 ms (12.0x)" in text
    assert text.count("60 ms (10.0x)") == 1  # the other vocabulary's


def test_readme_needs_its_markers(house: Path) -> None:
    (house / "README.md").write_text("# no markers\n")
    assert write_readme(house) == 1


def test_readme_of_this_checkout() -> None:
    if not list(record.RESULTS.glob("kd-*.csv")):
        pytest.skip("no rows have been measured yet")
    assert readme.main(["--check"]) == 0
