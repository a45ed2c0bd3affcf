"""Write the table and the plot of README.md from the rows in bench/results.

    python bench/readme.py
    python bench/readme.py --check

The second writes nothing; its exit status is 1 if README.md says something else than the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

from bench import plot, record  # noqa: E402

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PROVIDERS = {
    "eager": "eager",
    "compiled": "compiled",
    "liger": "Liger",
    "fastkd": "fastkd",
    "fastkd-overwrite": "fastkd, overwriting",
}
PROBLEM = ("machine", "threads", "dtype", "divergence", "mode", "rows", "vocab")
PLOTTED = "forward_kl"
WIDE_MARK = "†"
TRAINING = "forward+backward"
Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/readme.py", description=__doc__.split("\n")[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 on a difference")
    args = parser.parse_args(argv)
    text = args.readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{args.readme.name} must have one line {BEGIN} and one {END} after it")
        return 1
    rows = latest(load(args.results, "kd"))
    if not rows:
        print(f"no rows of kd in {args.results}: run `python bench/run.py kd`")
        return 1
    image = args.results / "kd.png"
    section = render(rows, latest(load(args.results, "call")), image, args.readme.parent)
    before, rest = text.split(BEGIN)
    wanted = f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"
    if args.check:
        if wanted != text:
            print(f"{args.readme.name} differs from the rows in {args.results}: run `python bench/readme.py`")
        return int(wanted != text)
    plot.speed(_panels(rows), image, "kd_loss, forward KL and cross-entropy, forward and backward")
    args.readme.write_text(wanted)
    return 0


def load(results: Path, family: str) -> list[Row]:
    return [row for path in sorted(results.glob(f"{family}-*.csv")) for row in record.read(path)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """For every problem the rows of the last run that had it: ratios hold within a run alone."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        taken = runs.setdefault(tuple(row[field] for field in PROBLEM), [])
        if taken and taken[0]["date"] > row["date"]:
            continue
        if taken and taken[0]["date"] < row["date"]:
            taken.clear()
        taken.append(row)
    return [row for key in sorted(runs, key=_order) for row in runs[key]]


def render(rows: Sequence[Row], calls: Sequence[Row], image: Path, folder: Path) -> str:
    rows = [row for row in rows if row["mode"] == TRAINING]
    link = image.resolve().relative_to(folder.resolve()).as_posix()
    parts = [f"![Speed of kd_loss against eager PyTorch]({link})"]
    for machine in dict.fromkeys(_machine(row) for row in rows):
        here = [row for row in rows if _machine(row) == machine]
        one_call = [row for row in calls if _machine(row) == machine]
        parts += [_table(here), _caption(machine, here, one_call)]
    parts.append("This section is written by `python bench/readme.py`.")
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    problems: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(tuple(row[field] for field in PROBLEM), {})[row["provider"]] = row
    providers = [name for name in PROVIDERS if any(name in found for found in problems.values())]
    heads = ["loss", "logits", *(PROVIDERS[name] for name in providers), "of floor", "extra memory"]
    lines = [heads, ["---", "---"] + ["---:"] * (len(heads) - 2)]
    for found in problems.values():
        any_row = next(iter(found.values()))
        ours = found.get("fastkd", {})
        lines.append(
            [
                f"`{any_row['divergence']}`",
                f"{any_row['rows']} x {int(any_row['vocab']):,} {any_row['dtype']}",
                *(_cell(found.get(name)) for name in providers),
                _of_floor(ours),
                _memory(found),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    ratio = f" ({float(row['times_eager']):.1f}x)" if row["times_eager"] and row["provider"] != "eager" else ""
    return f"{_time_of(row)}{ratio}"


def _time_of(row: Row) -> str:
    return _time(row["wall_ms"]) + (f" {WIDE_MARK}" if record.is_wide(row) else "")


def _of_floor(row: Row) -> str:
    """The floor is the longer of the times of the bytes and of the exponentials; a dash where one was not measured."""
    shares = [row.get("percent_of_copy"), row.get("percent_of_exp2")]
    return f"{max(float(share) for share in shares if share):.0f} %" if all(shares) else "-"


def _memory(found: dict[str, Row]) -> str:
    """fastkd's beside the inputs and the gradient, and eager code's."""
    ours, eager = (found.get(name, {}).get("extra_mib") for name in ("fastkd", "eager"))
    return f"{float(ours):.0f} MiB (eager {float(eager):.0f})" if ours and eager else ""


def _caption(machine: str, rows: Sequence[Row], calls: Sequence[Row]) -> str:
    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(row[field] for row in rows))

    commands = ", ".join(dict.fromkeys(f"`{row['command']}`" for row in rows))
    implementations = ", ".join(dict.fromkeys(row["impl"] for row in rows if row["impl"]))
    text = (
        f"{machine}, {all_of('isa')}, torch {all_of('torch')}: forward and backward, median of interleaved runs; in "
        f"parentheses how many times as fast as eager. fastkd is commit {all_of('commit')} ({implementations}). "
        "The floor of the column fastkd is the longer of two times: that of the bytes of two passes over all logits "
        f"and one gradient, at the rate of `copy_` ({_range(rows, 'copy_gb_per_s', 'GB/s')}), and that of the "
        "exponentials and logarithms "
        f"that these need, at the rate of `exp2` in cache ({_range(rows, 'exp2_gexp_per_s', 'G/s')}), both measured in "
        "the same runs. Extra memory is beside the inputs and the gradient; overwriting needs none for the gradient "
        f"either. Command: {commands}."
    )
    one_call = {row["provider"]: row for row in calls if row["divergence"] == PLOTTED}
    if {"eager", "fastkd"} <= one_call.keys():
        ours, eager = one_call["fastkd"], one_call["eager"]
        ratio = float(ours["wall_ms"]) / float(eager["wall_ms"])
        text += f" One call on 8 x 10 logits: {_time_of(ours)}, {ratio:.2f} of eager's {_time_of(eager)}."
    if WIDE_MARK in text or any(map(record.is_wide, rows)):
        text += (
            f" {WIDE_MARK}: the runs spread widely (their 80th percentile is over {record.WIDE} times their 20th), so "
            "that this time, and every ratio to it, is rough."
        )
    return text


def _range(rows: Sequence[Row], field: str, unit: str) -> str:
    values = sorted(float(row[field]) for row in rows if row.get(field))
    if not values:
        return "not measured"
    low, high = (f"{value:.3g}" for value in (values[0], values[-1]))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _time(milliseconds: str) -> str:
    value = float(milliseconds)
    return f"{value:.3g} ms" if value < 1000 and value >= 0.1 else _other_unit(value)


def _other_unit(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1000 else f"{milliseconds * 1e3:.1f} us"


def _machine(row: Row) -> str:
    return row["machine"] + (f", {row['threads']} threads" if row["device"] == "cpu" else "")


def _order(problem: tuple[str, ...]) -> tuple[object, ...]:
    *names, rows, vocab = problem
    return *names, int(vocab), int(rows)


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] == TRAINING and row["divergence"] == PLOTTED:
            panels.setdefault(f"{_machine(row)}, {row['dtype']}", []).append(row)
    return panels


if __name__ == "__main__":
    raise SystemExit(main())
