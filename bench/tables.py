"""How the rows of a bench become a table of README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import record

WIDE_MARK = "†"
FROZEN = "frozen-head"
Row = dict[str, str]


class Family(NamedTuple):
    """How the rows of a bench become a table."""

    problem: tuple[str, ...]  # columns that tell one problem from another; the last two are numbers
    providers: dict[str, str]  # in this order, with their headings
    headings: tuple[str, str, str, str]  # of two columns before the providers and two after; no heading, no column
    name: Callable[[Row], str]
    size: Callable[[Row], str]
    share: Callable[[Row], str]  # how close the row is to what no implementation can do without
    beside: tuple[str, ...]  # whose memory, or error, is named beside fastkd's
    of_all: str = "extra_mib"  # the last column: what is named of fastkd and of these


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


def table(rows: Sequence[Row], family: Family) -> str:
    problems: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(tuple(row[field] for field in family.problem), {})[row["provider"]] = row
    providers = [name for name in family.providers if any(name in found for found in problems.values())]
    first, second, share, memory = family.headings
    last = [share, memory] if share else [memory]
    headings = [first, second, *(family.providers[name] for name in providers), *last]
    lines = [headings, ["---", "---"] + ["---:"] * (len(headings) - 2)]
    for found in problems.values():
        any_row = next(iter(found.values()))
        ours = found.get("fastkd", {})
        lines.append(
            [
                f"`{family.name(any_row)}`",
                family.size(any_row),
                *(_cell(found.get(name)) for name in providers),
                *([family.share(ours)] if share else []),
                LAST[family.of_all](found, family.beside),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    ratio = f" ({float(row['times_eager']):.1f}x)" if row["times_eager"] and row["provider"] != "eager" else ""
    return f"{time_of(row)}{ratio}"


def time_of(row: Row) -> str:
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


def _errors(found: dict[str, Row], others: Sequence[str]) -> str:
    errors = {name: row["error"] for name in ("fastkd", *others) if (row := found.get(name)) and row["error"]}
    beside = ", ".join(f"{name} {100 * float(error):.1f}" for name, error in errors.items() if name != "fastkd")
    ours = f"{100 * float(errors['fastkd']):.1f} %" if "fastkd" in errors else "-"
    return f"{ours} ({beside})" if beside else ours


LAST: dict[str, Callable[[dict[str, Row], Sequence[str]], str]] = {"extra_mib": _memory, "error": _errors}


def _size_of_logits(row: Row) -> str:
    return f"{row['rows']} x {int(row['vocab']):,} {row['dtype']}"


def _size_of_heads(row: Row) -> str:
    hidden = " / ".join(dict.fromkeys((row["hidden"], row["teacher_hidden"])))
    frozen = ", student's frozen" if row["mode"] == FROZEN else ""
    return f"{row['rows']} x {hidden} x {int(row['vocab']):,} {row['dtype']}{frozen}"


def _size_of_features(row: Row) -> str:
    widths = " / ".join(dict.fromkeys((row["width"], row["teacher_width"])))
    positions = f" x {row['positions']}" if row.get("positions") else ""
    return f"{int(row['rows']):,} x {widths}{positions} {row['dtype']}"


def _size_of_attention(row: Row) -> str:
    causal = ", causal" if row["causal"] == "yes" else ""
    return f"{row['batch']} x {row['heads']} x {int(row['tokens']):,} x {row['dim']} {row['dtype']}{causal}"


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
    name=lambda row: row["divergence"],
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
    name=lambda row: row["divergence"],
    size=_size_of_heads,
    share=_of_matmul,
    beside=("eager", "compiled"),
)


def _time(milliseconds: str) -> str:
    value = float(milliseconds)
    return f"{value:.3g} ms" if value < 1000 and value >= 0.1 else _other_unit(value)


def _other_unit(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1000 else f"{milliseconds * 1e3:.1f} us"


RELATIONS = Family(
    problem=("machine", "threads", "dtype", "mode", "loss", "teacher_width", "rows", "width"),
    providers={
        "eager": "eager",
        "compiled": "compiled",
        "torchdistill": "torchdistill",
        "pykeops": "PyKeOps",
        "fastkd": "fastkd",
        "fastkd-prepared": "fastkd, teacher prepared",
    },
    headings=("loss", "features", "", "extra memory"),
    name=lambda row: row["loss"],
    size=_size_of_features,
    share=lambda row: "",
    beside=("eager", "compiled"),
)
ATTENTION = Family(
    problem=("machine", "threads", "dtype", "mode", "causal", "batch", "heads", "dim", "tokens"),
    providers={"eager": "eager", "compiled": "compiled", "fastkd": "fastkd"},
    headings=("loss", "queries and keys", "of matmuls", "extra memory"),
    name=lambda row: "attention_kl_loss",
    size=_size_of_attention,
    share=_of_matmul,
    beside=("eager", "compiled"),
)


INT8 = Family(
    problem=("machine", "threads", "terms", "columns", "rows"),
    providers={
        "eager": "float32",
        "bfloat16": "bfloat16",
        "torch-dynamic": "torch dynamic",
        "torchao": "torchao",
        "torchao-compiled": "torchao, compiled",
        "quanto": "quanto",
        "bitsandbytes": "bitsandbytes",
        "fastkd": "fastkd",
    },
    headings=("layer", "rows x in x out", "of peak", "error"),
    name=lambda row: "Int8Linear",
    size=lambda row: f"{row['rows']} x {int(row['terms']):,} x {int(row['columns']):,}",
    share=_of_matmul,
    beside=("torch-dynamic", "torchao", "quanto", "bitsandbytes"),
    of_all="error",
)


def _size_of_images(row: Row) -> str:
    groups = "" if row["groups"] == "1" else f", {row['groups']} groups"
    kernel = f"{row['kernel']} x {row['kernel']}" + ("" if row["stride"] == "1" else f", stride {row['stride']}")
    return f"{row['images']} x {row['channels']} x {row['side']}² to {row['count']}, {kernel}{groups}"


INT8_CONV = Family(
    problem=("machine", "threads", "kernel", "stride", "groups", "images", "side", "count", "channels"),
    providers={
        "eager": "float32",
        "bfloat16": "bfloat16",
        "torch-static": "torch static",
        "fastkd": "fastkd",
        "fastkd-static": "fastkd, static",
    },
    headings=("layer", "images", "of peak", "error"),
    name=lambda row: "Int8Conv2d",
    size=_size_of_images,
    share=_of_matmul,
    beside=("torch-static",),
    of_all="error",
)


def machine_of(row: Row) -> str:
    threads = f"{row['threads']} thread" + ("" if row["threads"] == "1" else "s")
    return row["machine"] + (f", {threads}" if row["device"] == "cpu" else "")


def _order(problem: tuple[str, ...]) -> tuple[object, ...]:
    *names, first, second = problem
    return *names, int(second), int(first)
