"""The section of README.md that is written from the benches' rows: it says what they say, and when to doubt them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import outliers, readme, record


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


def spread(row: record.Row, p20: float, p80: float) -> record.Row:
    return row | {"wall_p20_ms": p20, "wall_p80_ms": p80}


@pytest.mark.parametrize(("p80", "mark"), [(649, ""), (651, " †")])
@pytest.mark.parametrize("wide", ["eager", "fastkd"])
def test_readme_marks_times_that_spread_widely(house: Path, wide: str, p80: float, mark: str) -> None:
    rows = [sample_row("eager", 7, 600), sample_row("fastkd", 7, 60)]
    spreads = [spread(row, 500, p80) if row["provider"] == wide else spread(row, 60, 60) for row in rows]
    record.append(house / "results" / "kd-zzz.csv", spreads)
    write_readme(house)
    text = (house / "README.md").read_text()
    marks = {"eager": "", "fastkd": "", wide: mark}
    assert f"x 7 float32 | 600 ms{marks['eager']} | 60 ms{marks['fastkd']} (10.0x) |" in text
    assert ("†: the runs spread widely (their 80th percentile is over 1.3 times their 20th)" in text) == bool(mark)
    assert text.count("†") == (2 if mark else 0)


def test_readme_marks_one_call_that_spreads_widely(house: Path) -> None:
    calls = [{**sample_row("eager", 10, 0.1, "2030-01-02"), "rows": 8}, sample_row("fastkd", 10, 0.04, "2030-01-02")]
    record.append(
        house / "results" / "call-zzz.csv", [spread(calls[0], 0.05, 0.2), spread({**calls[1], "rows": 8}, 1, 1)]
    )
    write_readme(house)
    text = (house / "README.md").read_text()
    assert "40.0 us, 0.40 of eager's 0.1 ms †. †: the runs spread" in text


def head_rows(mode: str = "forward+backward", **columns: object) -> list[record.Row]:
    """Of one run of the bench of two heads."""
    shape = {"mode": mode, "hidden": 512, "teacher_hidden": 512, "hard_term": "yes", "workspace_mib": ""}
    shape |= {"percent_of_matmul": 89.6, "matmul_gflop_per_s": 160, "command": "python bench/run.py head"}
    times = {"eager": (600, 1470), "compiled": (300, 489), "linear-cross-entropy": (1200, 687), "fastkd": (150, 99)}
    return [
        sample_row(name, 50257, milliseconds) | shape | {"extra_mib": mib} | columns
        for name, (milliseconds, mib) in times.items()
    ]


def test_readme_has_a_table_of_two_heads(house: Path) -> None:
    write_readme(house)
    assert "hidden size" not in (house / "README.md").read_text()
    path = house / "results" / "head-abacus-9.csv"
    record.append(path, head_rows())
    record.append(path, head_rows("frozen-head", teacher_hidden=1024))
    record.append(path, [row for row in head_rows(rows=64, hard_term="no") if row["provider"] == "fastkd"])
    record.append(path, [row for row in head_rows(rows=32, workspace_mib=8) if row["provider"] == "fastkd"])
    write_readme(house)
    text = (house / "README.md").read_text()
    assert "| loss | heads | eager | compiled | linear_cross_entropy | fastkd | of matmuls | extra memory |" in text
    times = "600 ms | 300 ms (2.0x) | 1.20 s (0.5x) | 150 ms (4.0x) | 90 % | 99 MiB (eager 1470, compiled 489) |"
    assert f"| `forward_kl` | 512 x 512 x 50,257 float32 | {times}" in text
    assert f"| `forward_kl` | 512 x 512 / 1024 x 50,257 float32, student's frozen | {times}" in text
    assert "measured in the same runs (160 GFLOP/s)" in text
    assert "Command: `python bench/run.py head`." in text
    assert "| 64 x" not in text  # another loss
    assert "| 32 x" not in text  # not what fastkd does by default
    assert text.count("†") == 0
    record.append(path, [spread(row, 100, 150) for row in head_rows(date="2030-01-02")])
    write_readme(house)
    assert "150 ms † (4.0x)" in (house / "README.md").read_text()


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


def test_tables_of_relations_and_of_attention(house: Path) -> None:
    features = {"loss": "rkd-angle", "rows": 1024, "width": 64, "teacher_width": 128, "positions": "", "vocab": ""}
    relation = [
        sample_row(name, 0, milliseconds) | features | {"extra_mib": mib, "command": "python bench/run.py relation"}
        for name, milliseconds, mib in (("eager", 600, 1470), ("fastkd", 3, 2), ("fastkd-prepared", 2, 1))
    ]
    shape = {"batch": 1, "heads": 8, "tokens": 4096, "dim": 64, "causal": "yes", "percent_of_matmul": 61.6}
    shape |= {"matmul_gflop_per_s": 160, "command": "python bench/run.py attention"}
    attention = [sample_row(name, 0, milliseconds) | shape for name, milliseconds in (("eager", 600), ("fastkd", 150))]
    maps = [sample_row("fastkd", 0, 3) | features | {"loss": "nst", "positions": "7 x 7", "threads": 1}]
    record.append(house / "results" / "relation-abacus-9.csv", [*relation, *maps])
    record.append(house / "results" / "attention-abacus-9.csv", attention)
    write_readme(house)
    text = (house / "README.md").read_text()
    assert (
        "| loss | features | eager | fastkd | fastkd, teacher prepared | extra memory |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| `rkd-angle` | 1,024 x 64 / 128 float32 | 600 ms | 3 ms (200.0x) | 2 ms (300.0x) | 2 MiB (eager 1470) |\n"
    ) in text
    assert "| `nst` | 1,024 x 64 / 128 x 7 x 7 float32 |" in text
    assert "Abacus 9, 1 thread, beads" in text
    row = "| `attention_kl_loss` | 1 x 8 x 4,096 x 64 float32, causal | 600 ms | 150 ms (4.0x) | 62 % |"
    assert row in text
    for said in ("`python bench/run.py relation`", "`python bench/run.py attention`", "(160 GFLOP/s)"):
        assert said in text
    assert write_readme(house, "--check") == 0


def test_tables_of_int8_layers_and_of_outliers(house: Path) -> None:
    shape = {"rows": 8, "terms": 1024, "columns": 4096, "percent_of_matmul": 61.6, "matmul_gflop_per_s": 410}
    shape |= {"command": "python bench/run.py int8"}
    rivals = (("eager", 6, 1e-7), ("torch-dynamic", 3, 0.0221), ("quanto", 4, 0.0123), ("fastkd", 1.5, 0.0112))
    rows = [
        sample_row(name, 0, milliseconds) | shape | {"error": error, "times_eager": 6 / milliseconds}
        for name, milliseconds, error in rivals
    ]
    record.append(house / "results" / "int8-abacus-9.csv", rows)
    images = {"images": 8, "channels": 256, "side": 28, "count": 512, "kernel": 1, "stride": 2, "groups": 1}
    images |= {"percent_of_matmul": "", "matmul_gflop_per_s": 400}
    rivals = (("eager", 9, 1e-7), ("torch-static", 6, 0.02), ("fastkd", 4.5, 0.013), ("fastkd-static", 4, 0.014))
    rows = [
        sample_row(name, 0, milliseconds) | images | {"error": error, "times_eager": 9 / milliseconds}
        for name, milliseconds, error in rivals
    ]
    rows[2]["percent_of_matmul"] = 120.4
    record.append(house / "results" / "int8_conv-abacus-9.csv", rows)
    assert outliers.main(["--width", "32", "--gain", "1", "100", "--out", str(house / "results")]) == 0
    write_readme(house)
    text = (house / "README.md").read_text()
    assert (
        "| layer | rows x in x out | float32 | torch dynamic | quanto | fastkd | of peak | error |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| `Int8Linear` | 8 x 1,024 x 4,096 | 6 ms | 3 ms (2.0x) | 4 ms (1.5x) | 1.5 ms (4.0x) | 62 % "
        "| 1.1 % (torch-dynamic 2.2, quanto 1.2) |\n"
    ) in text
    row = "| `Int8Conv2d` | 8 x 256 x 28² to 512, 1 x 1, stride 2 | 9 ms | 6 ms (1.5x) | 4.5 ms (2.0x) | 4 ms (2.2x) |"
    assert row in text
    assert "forward, median of interleaved runs" in text
    assert text.count("(400 GFLOP/s); more than all of it, where fewer products do. The error") == 1
    assert text.count("(410 GFLOP/s). The error") == 1
    assert "| input | smoothed | gain 1 | gain 100 |" in text
    assert "| dynamic | yes | " in text
    assert "`python bench/outliers.py`" in text
    assert write_readme(house, "--check") == 0


def test_smoothing_gets_back_what_outliers_cost() -> None:
    errors = {(row["scheme"], row["smoothed"]): float(str(row["error"])) for row in outliers.measured(30, 128)}
    for scheme in ("dynamic", "static"):
        assert errors[scheme, True] < 0.5 * errors[scheme, False]
    assert errors["dynamic", False] < errors["static", False] < errors["torch dynamic", False]
