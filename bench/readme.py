"""Write the tables and the plot of README.md from the rows in bench/results.

    python bench/readme.py
    python bench/readme.py --check

The second writes nothing; its exit status is 1 if README.md says something else than the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

from bench import plot, record  # noqa: E402
from bench.tables import (  # noqa: E402
    ATTENTION,
    HEADS,
    INT8,
    INT8_CONV,
    LOGITS,
    RELATIONS,
    WIDE_MARK,
    Family,
    Row,
    latest,
    load,
    machine_of,
    table,
    time_of,
)

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PLOTTED = "forward_kl"
TRAINING = "forward+backward"
TAILS = "tails.csv"
OUTLIERS = "outliers.csv"


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
    section = render(args.results, rows, image.resolve().relative_to(args.readme.parent.resolve()).as_posix())
    before, rest = text.split(BEGIN)
    wanted = f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"
    if args.check:
        if wanted != text:
            print(f"{args.readme.name} differs from the rows in {args.results}: run `python bench/readme.py`")
        return int(wanted != text)
    plot.speed(_panels(rows), image, "kd_loss, forward KL and cross-entropy, forward and backward")
    args.readme.write_text(wanted)
    return 0


def render(results: Path, rows: Sequence[Row], link: str) -> str:
    calls, heads = latest(load(results, "call"), LOGITS), latest(load(results, "head"), HEADS)
    tails, outliers = (record.read(path) if path.exists() else [] for path in (results / TAILS, results / OUTLIERS))
    layers, convolutions = latest(load(results, "int8"), INT8), latest(load(results, "int8_conv"), INT8_CONV)
    relations = latest(load(results, "relation"), RELATIONS)
    attention = latest(load(results, "attention"), ATTENTION)

    def caption(machine: str, here: Sequence[Row]) -> str:
        return _caption(machine, here, [row for row in calls if machine_of(row) == machine])

    parts = [f"![Speed of kd_loss against eager PyTorch]({link})"]
    parts += _tables([row for row in rows if row["mode"] == TRAINING], LOGITS, caption)
    whole = [row for row in heads if row["hard_term"] == "yes" and not row["workspace_mib"]]
    parts += _tables(whole, HEADS, _head_caption)
    parts += _tables([row for row in relations if row["mode"] == TRAINING], RELATIONS, _relation_caption)
    parts += _tables([row for row in attention if row["mode"] == TRAINING], ATTENTION, _attention_caption)
    parts += _tables(layers, INT8, partial(_int8_caption, "Linear layers"))
    parts += _tables(convolutions, INT8_CONV, partial(_int8_caption, "Convolutions of channels-last images"))
    if outliers:
        parts += [_outliers_table(outliers), _outliers_caption(outliers)]
    if tails:
        parts += [_tails_table(tails), _tails_caption(tails)]
    parts.append("This section is written by `python bench/readme.py`.")
    return "\n\n".join(parts)


def _tables(rows: Sequence[Row], family: Family, caption: Callable[[str, Sequence[Row]], str]) -> list[str]:
    """One for each machine, and what is to be said of it."""
    parts = []
    for machine in dict.fromkeys(machine_of(row) for row in rows):
        here = [row for row in rows if machine_of(row) == machine]
        parts += [table(here, family), caption(machine, here)]
    return parts


def _outliers_table(rows: Sequence[Row]) -> str:
    gains = list(dict.fromkeys(row["gain"] for row in rows))
    errors = {(row["scheme"], row["smoothed"], row["gain"]): row["error"] for row in rows}
    lines = [["input", "smoothed", *(f"gain {gain}" for gain in gains)], ["---", "---"] + ["---:"] * len(gains)]
    for scheme, smoothed in dict.fromkeys((row["scheme"], row["smoothed"]) for row in rows):
        cells = [f"{100 * float(errors[scheme, smoothed, gain]):.1f} %" for gain in gains]
        lines.append([scheme, "yes" if smoothed == "True" else "no", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _outliers_caption(rows: Sequence[Row]) -> str:
    return (
        "What outliers of activations cost an int8 layer, and what `smooth` gets back: the relative error of a linear "
        "layer behind a `LayerNorm` whose gain is 1 but in 8 of its channels, calibrated on other rows. "
        f"fastkd is commit {rows[0]['commit']}. Command: `python bench/outliers.py`."
    )


def _int8_caption(layers: str, machine: str, rows: Sequence[Row]) -> str:
    over = any(float(row.get("percent_of_matmul") or 0) > 100 for row in rows)
    fewer = "; more than all of it, where fewer products do" if over else ""
    text = (
        f"{layers} from float input to float output, with the rounding of the input. "
        f"{_circumstances(machine, rows, 'forward')} Of peak: what part of its time the products alone take, made in "
        f"registers by the same instruction ({_range(rows, 'matmul_gflop_per_s', 'GFLOP/s')}){fewer}. The error is "
        f"that of the output, relative to float64. {_commands(rows)}"
    )
    return text + (_wide_note() if any(map(record.is_wide, rows)) else "")


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
        text += f" One call on 8 x 10 logits: {time_of(ours)}, {ratio:.2f} of eager's {time_of(eager)}."
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


def _relation_caption(machine: str, rows: Sequence[Row]) -> str:
    text = (
        "Losses on the features of a batch, rows x width (student / teacher), or maps with positions; eager is the "
        "published code. "
        f"{_circumstances(machine, rows)} Extra memory is beside the features and the gradient. {_commands(rows)}"
    )
    return text + (_wide_note() if any(map(record.is_wide, rows)) else "")


def _attention_caption(machine: str, rows: Sequence[Row]) -> str:
    text = (
        "From queries and keys, batch x heads x tokens x dim of both models, to the gradients of the student's two. "
        f"{_circumstances(machine, rows)} Of matmuls: what part of its time the four products take that no "
        "implementation can do without, measured in the same runs "
        f"({_range(rows, 'matmul_gflop_per_s', 'GFLOP/s')}); fastkd makes the scores twice instead of keeping them, "
        "which is two products more, and is above 100 % where its own products, which never leave the cache, are "
        f"faster than torch's. Extra memory is beside the inputs and the gradients. {_commands(rows)}"
    )
    return text + (_wide_note() if any(map(record.is_wide, rows)) else "")


def _circumstances(machine: str, rows: Sequence[Row], passes: str = "forward and backward") -> str:
    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(row[field] for row in rows))

    implementations = ", ".join(dict.fromkeys(row["impl"] for row in rows if row["impl"]))
    return (
        f"{machine}, {all_of('isa')}, torch {all_of('torch')}: {passes}, median of interleaved runs; in "
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


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] == TRAINING and row["divergence"] == PLOTTED:
            panels.setdefault(f"{machine_of(row)}, {row['dtype']}", []).append(row)
    return panels


if __name__ == "__main__":
    raise SystemExit(main())
