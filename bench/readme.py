"""Write the tables and the plot of README.md from the rows in bench/results.

    python bench/readme.py
    python bench/readme.py --check

The second writes nothing; its exit status is 1 if README.md says something else than the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

from bench import plot, record  # noqa: E402

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PLOTTED = "forward_kl"
WIDE_MARK = "†"
TRAINING = "forward+backward"
FROZEN = "frozen-head"
TAILS = "tails.csv"
Row = dict[str, str]


class Family(NamedTuple):
    """How the rows of a bench become a table."""

    problem: tuple[str, ...]  # columns that tell one problem from another
    providers: dict[str, str]  # in this order, with their headings
    headings: tuple[str, str, str, str]  # of the columns before the providers and after them
    size: Callable[[Row], str]
    share: Callable[[Row], str]  # how close the row is to what no implementation can do without
    beside: tuple[str, ...]  # whose memory is named beside fastkd's


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
    rows = latest(load(args.results, "kd"), LOGITS)
    if not rows:
        print(f"no rows of kd in {args.results}: run `python bench/run.py kd`")
        return 1
    image = args.results / "kd.png"
    calls, heads = latest(load(args.results, "call"), LOGITS), latest(load(args.results, "head"), HEADS)
    tails = record.read(args.results / TAILS) if (args.results / TAILS).exists() else []
    section = render(rows, calls, heads, image, args.readme.parent, tails)
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


def latest(rows: Iterable[Row], family: Family) -> list[Row]:
    """For every problem the rows of the last run that had it: ratios hold within a run alone."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        taken = runs.setdefault(tuple(row[field] for field in family.problem), [])
        if taken and taken[0]["date"] > row["date"]:
            continue
        if taken and taken[0]["date"] < row["date"]:
            taken.clear()
        taken.append(row)
    return [row for key in sorted(runs, key=_order) for row in runs[key]]


def render(
    rows: Sequence[Row],
    calls: Sequence[Row],
    heads: Sequence[Row],
    image: Path,
    folder: Path,
    tails: Sequence[Row] = (),
) -> str:
    rows = [row for row in rows if row["mode"] == TRAINING]
    link = image.resolve().relative_to(folder.resolve()).as_posix()
    parts = [f"![Speed of kd_loss against eager PyTorch]({link})"]
    for machine in dict.fromkeys(_machine(row) for row in rows):
        here = [row for row in rows if _machine(row) == machine]
        one_call = [row for row in calls if _machine(row) == machine]
        parts += [_table(here, LOGITS), _caption(machine, here, one_call)]
    heads = [row for row in heads if row["hard_term"] == "yes" and not row["workspace_mib"]]
    for machine in dict.fromkeys(_machine(row) for row in heads):
        here = [row for row in heads if _machine(row) == machine]
        parts += [_table(here, HEADS), _head_caption(machine, here)]
    if tails:
        parts += [_tails_table(tails), _tails_caption(tails)]
    parts.append("This section is written by `python bench/readme.py`.")
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], family: Family) -> str:
    problems: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(tuple(row[field] for field in family.problem), {})[row["provider"]] = row
    providers = [name for name in family.providers if any(name in found for found in problems.values())]
    first, second, *last = family.headings
    headings = [first, second, *(family.providers[name] for name in providers), *last]
    lines = [headings, ["---", "---"] + ["---:"] * (len(headings) - 2)]
    for found in problems.values():
        any_row = next(iter(found.values()))
        ours = found.get("fastkd", {})
        lines.append(
            [
                f"`{any_row['divergence']}`",
                family.size(any_row),
                *(_cell(found.get(name)) for name in providers),
                family.share(ours),
                _memory(found, family.beside),
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


def _of_matmul(row: Row) -> str:
    return f"{float(row['percent_of_matmul']):.0f} %" if row.get("percent_of_matmul") else "-"


def _memory(found: dict[str, Row], others: Sequence[str]) -> str:
    """fastkd's beside the inputs and the gradients, and that of others."""
    extra = {name: found.get(name, {}).get("extra_mib") for name in ("fastkd", *others)}
    beside = ", ".join(f"{name} {float(mib):.0f}" for name, mib in extra.items() if mib and name != "fastkd")
    return f"{float(extra['fastkd']):.0f} MiB ({beside})" if extra["fastkd"] and beside else ""


def _size_of_logits(row: Row) -> str:
    return f"{row['rows']} x {int(row['vocab']):,} {row['dtype']}"


def _size_of_heads(row: Row) -> str:
    hidden = " / ".join(dict.fromkeys((row["hidden"], row["teacher_hidden"])))
    frozen = ", student's frozen" if row["mode"] == FROZEN else ""
    return f"{row['rows']} x {hidden} x {int(row['vocab']):,} {row['dtype']}{frozen}"


LOGITS = Family(
    problem=("machine", "threads", "dtype", "divergence", "mode", "rows", "vocab"),
    providers={
        "eager": "eager",
        "compiled": "compiled",
        "liger": "Liger",
        "fastkd": "fastkd",
        "fastkd-overwrite": "fastkd, overwriting",
    },
    headings=("loss", "logits", "of floor", "extra memory"),
    size=_size_of_logits,
    share=_of_floor,
    beside=("eager",),
)
HEADS = Family(
    problem=(
        *("machine", "threads", "dtype", "divergence", "hard_term", "workspace_mib", "hidden", "teacher_hidden"),
        *("mode", "rows", "vocab"),
    ),
    providers={
        "eager": "eager",
        "compiled": "compiled",
        "linear-cross-entropy": "linear_cross_entropy",
        "liger-fused": "Liger, fused",
        "liger-chunked": "Liger, chunked",
        "fastkd": "fastkd",
        "fastkd-float32": "fastkd, float32",
    },
    headings=("loss", "heads", "of matmuls", "extra memory"),
    size=_size_of_heads,
    share=_of_matmul,
    beside=("eager", "compiled"),
)


def _tails_table(rows: Sequence[Row]) -> str:
    """A line for each tail; for each divergence and k, how far the gradient is from that of the whole teacher."""
    problems = list(dict.fromkeys((row["divergence"], row["k"]) for row in rows))
    errors = {(row["tail"], row["divergence"], row["k"]): row for row in rows}
    lines = [["tail", *(f"`{divergence}`, k = {k}" for divergence, k in problems)], ["---"] + ["---:"] * len(problems)]
    for tail in dict.fromkeys(row["tail"] for row in rows):
        cells = [errors.get((tail, *problem)) for problem in problems]
        lines.append([f"`{tail}`", *("-" if row is None else _tail_cell(row) for row in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tail_cell(row: Row) -> str:
    error = f"{100 * float(row['gradient_error']):.0f} %"
    mean = f" ({100 * float(row['gradient_error_of_mean']):.0f} %)" if row["draws"] != "1" else ""
    return f"{error}{mean}, {float(row['cosine']):.2f}"


def _tails_caption(rows: Sequence[Row]) -> str:
    mass = dict.fromkeys((row["k"], f"{100 * float(row['mass_of_the_k']):.0f} %") for row in rows)
    draws = max(rows, key=lambda row: int(row["draws"]))["draws"]
    return (
        "What the `tail` of a `TopK` teacher costs: the distance of the student's gradient from that of the whole "
        "teacher, relative to its length, and the cosine between the two; for `samples` with k draws a row, and in "
        f"parentheses the mean of {draws} such gradients, which nears the whole teacher's as they become more. The "
        f"logits are those of the demo's language models with 32k tokens, after {rows[0]['teacher_steps']} steps of "
        "the teacher's training, on texts that were held out; of the teacher's probability the k best hold "
        f"{', '.join(f'{share} (k = {k})' for k, share in mass)}. fastkd is commit {rows[0]['commit']}. Command: "
        "`python bench/tails.py`."
    )


def _caption(machine: str, rows: Sequence[Row], calls: Sequence[Row]) -> str:
    text = (
        f"{_circumstances(machine, rows)} "
        "The floor of the column fastkd is the longer of two times: that of the bytes of two passes over all logits "
        f"and one gradient, at the rate of `copy_` ({_range(rows, 'copy_gb_per_s', 'GB/s')}), and that of the "
        "exponentials and logarithms "
        f"that these need, at the rate of `exp2` in cache ({_range(rows, 'exp2_gexp_per_s', 'G/s')}), both measured in "
        "the same runs. Extra memory is beside the inputs and the gradient; overwriting needs none for the gradient "
        f"either. {_commands(rows)}"
    )
    one_call = {row["provider"]: row for row in calls if row["divergence"] == PLOTTED}
    if {"eager", "fastkd"} <= one_call.keys():
        ours, eager = one_call["fastkd"], one_call["eager"]
        ratio = float(ours["wall_ms"]) / float(eager["wall_ms"])
        text += f" One call on 8 x 10 logits: {_time_of(ours)}, {ratio:.2f} of eager's {_time_of(eager)}."
    return text + (_wide_note() if WIDE_MARK in text or any(map(record.is_wide, rows)) else "")


def _head_caption(machine: str, rows: Sequence[Row]) -> str:
    text = (
        "The same loss of two `Head`s, tokens x hidden size x vocabulary, from hidden states and weights to their "
        f"gradients. {_circumstances(machine, rows)} Of matmuls: what part of its time the matmuls alone take that no "
        "implementation can do without (both logits, and the gradients of the student's input and, unless it is "
        "frozen, weight), each with all tokens at once, measured in the same runs "
        f"({_range(rows, 'matmul_gflop_per_s', 'GFLOP/s')}). Extra memory is beside the inputs and the gradients."
    )
    if any(row["provider"] == "linear-cross-entropy" for row in rows):
        text += (
            " `linear_cross_entropy` is torch's, given the teacher's probabilities, which it does not take in chunks, "
            "and once more for the labels."
        )
    return f"{text} {_commands(rows)}" + (_wide_note() if any(map(record.is_wide, rows)) else "")


def _circumstances(machine: str, rows: Sequence[Row]) -> str:
    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(row[field] for row in rows))

    implementations = ", ".join(dict.fromkeys(row["impl"] for row in rows if row["impl"]))
    return (
        f"{machine}, {all_of('isa')}, torch {all_of('torch')}: forward and backward, median of interleaved runs; in "
        f"parentheses how many times as fast as eager. fastkd is commit {all_of('commit')} ({implementations})."
    )


def _commands(rows: Sequence[Row]) -> str:
    return "Command: " + ", ".join(dict.fromkeys(f"`{row['command']}`" for row in rows)) + "."


def _wide_note() -> str:
    return (
        f" {WIDE_MARK}: the runs spread widely (their 80th percentile is over {record.WIDE} times their 20th), so "
        "that this time, and every ratio to it, is rough."
    )


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
