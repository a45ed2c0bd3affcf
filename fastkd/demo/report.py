"""What the demo says at the end: a table for each part, and the same numbers in a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli import versions
from . import memory
from .digits import DigitsResult, spread
from .int8 import Int8Row
from .methods_report import MethodsResult, as_json
from .settings import Settings
from .text import Curve, TextResult

MEASURED = ("loss_milliseconds", "step_milliseconds", "peak_megabytes")


def write_json(
    path: Path,
    settings: Settings,
    digits: DigitsResult | None,
    text: TextResult | None,
    int8: Sequence[Int8Row] = (),
    methods: MethodsResult | None = None,
) -> None:
    report: dict[str, Any] = {"versions": versions(), "settings": dataclasses.asdict(settings)}
    if digits is not None:
        means = {name: mean_and_spread(values) for name, values in students(digits).items()}
        report["digits"] = {**dataclasses.asdict(digits), "gain": digits.gain(), "mean_and_spread": means}
    if text is not None:
        fields = _known(dataclasses.asdict(text))
        fields["held_out"] = _known(fields["held_out"])
        report["text"] = {
            **fields,
            "ratio": ratios(text, text.fastkd),
            **({} if text.heads is None else {"heads_ratio": ratios(text, text.heads)}),
            **({} if text.int8 is None else {"int8_ratio": ratios(text, text.int8)}),
            "perplexity": {name: math.exp(loss) for name, loss in fields["held_out"].items()},
            "peak_megabytes_is": memory.MEANING,
        }
    if int8:
        report["int8"] = {row.name: {**dataclasses.asdict(row), "mean_and_spread": row.means()} for row in int8}
    if methods is not None:
        report["methods"] = as_json(methods)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what was not run."""
    return {name: value for name, value in fields.items() if value is not None}


def students(result: DigitsResult) -> dict[str, Sequence[float]]:
    return {"labels_alone": result.labels_alone, "distilled": result.distilled, **result.terms}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), spread(values)


def ratios(result: TextResult, curve: Curve) -> dict[str, float | None]:
    return {field: ratio(result, curve, field) for field in MEASURED}


def ratio(result: TextResult, curve: Curve, field: str) -> float | None:
    """Eager divided by one of the others."""
    eager, fast = getattr(result.eager, field), getattr(curve, field)
    return eager / fast if eager and fast else None


def print_digits(console: Console, result: DigitsResult) -> None:
    table = Table(title=f"Handwritten digits, {result.test_rows} test images", title_style="bold")
    table.add_column("trained with")
    for heading in ("parameters", "images", "labels", "accuracy %"):
        table.add_column(heading, justify="right")
    teacher, student = f"{result.teacher_parameters:,}", f"{result.student_parameters:,}"
    rows, labels = str(result.train_rows), str(result.labels)
    table.add_row("teacher: cross-entropy", teacher, rows, rows, f"{result.teacher_accuracy:.1f}", end_section=True)
    alone, distilled, *of_terms = (
        f"{mean:.1f} ± {std:.1f}" for mean, std in map(mean_and_spread, students(result).values())
    )
    table.add_row("student: cross-entropy", student, labels, labels, alone)
    distilled = f"[bold green]{distilled}[/]"
    table.add_row("student: fastkd.kd_loss", student, rows, labels, distilled, end_section=bool(of_terms))
    for name, accuracy in zip(result.terms, of_terms, strict=True):
        table.add_row(f"student: {name}", student, rows, labels, accuracy)
    table.caption = (
        f"Mean ± standard deviation of {len(result.distilled)} seeds: distillation gains {result.gain():.1f} points. "
        "Images without a label have alpha = 0: the teacher alone speaks about them."
    )
    if of_terms:
        table.caption += (
            " The last rows: cross-entropy of the labels and one term on the last hidden layer's features of all "
            "images. These students never see the teacher's logits."
        )
    console.print(table)


def print_text(console: Console, result: TextResult) -> None:
    console.print(_cost_table(result))
    console.print(_learning_table(result))


def _cost_table(result: TextResult) -> Table:
    table = Table(title=f"Language model, {result.rows_per_step} x {result.vocabulary:,} logits", title_style="bold")
    table.add_column("median of a training step")
    curves = result.curves()
    others = [name for name in curves if name != "eager"]
    for heading in (*curves, *(f"eager / {name}" for name in others)):
        table.add_column(heading, justify="right")

    def row(name: str, field: str, unit: str) -> None:
        values = [_measured(curve, field, unit) for curve in curves.values()]
        quotients = [ratio(result, curves[other], field) for other in others]
        shown = ["" if quotient is None else f"[bold green]{quotient:.1f} x[/]" for quotient in quotients]
        for place, other in enumerate(others):
            if field == "loss_milliseconds" and other != "fastkd":  # that has the heads' matmuls in it
                values[1 + place], shown[place] = f"{values[1 + place]} *", ""
        table.add_row(name, *values, *shown)

    row("loss, forward and backward", "loss_milliseconds", "ms")
    row("whole step", "step_milliseconds", "ms")
    row("peak memory beside weights", "peak_megabytes", "MB")
    last = [f"{curve.losses[-1]:.6f}" for curve in curves.values()]
    table.add_row("loss of the last step", *last, *("" for _ in others))
    table.caption = (
        f"fastkd ran {result.implementation}. Steps were taken in turns on the same batches; over the first "
        f"{result.compared_steps} the {'two' if result.heads is None else 'three'} losses differ by "
        f"{result.largest_difference:.1e} at most (relative). Memory: {memory.MEANING}."
    )
    if result.heads is not None:
        table.caption += (
            " heads: hidden states and output matrices instead of logits, which are computed a few rows at a time."
        )
    if result.int8 is not None:
        table.caption += (
            " int8 teacher: as heads, from a teacher whose layers are int8, its output matrix too: another teacher, "
            f"whose losses differ from eager's by {result.int8_difference:.1e} at most (relative)."
        )
    if len(others) > 1:
        table.caption += (
            " * The matmuls of both heads are in this time; for the others they are in the whole step alone."
        )
    return table


def _measured(curve: Curve, field: str, unit: str) -> str:
    value = getattr(curve, field)
    return "not available" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def _learning_table(result: TextResult) -> Table:
    table = Table(title=f"What it learned, {result.evaluated_tokens:,} tokens of held-out texts", title_style="bold")
    for heading in ("model", "parameters", "steps", "nats per token", "perplexity"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    held_out = result.held_out
    teacher, student = f"{result.teacher_parameters:,}", f"{result.student_parameters:,}"
    steps = str(len(result.fastkd.losses))
    for name, parameters, trained, loss in (
        ("token frequencies", "", "", held_out.token_frequencies),
        ("teacher", teacher, str(result.teacher_steps), held_out.teacher),
        ("teacher with int8 layers", teacher, str(result.teacher_steps), held_out.teacher_int8),
        ("student before training", student, "0", held_out.student_untrained),
        ("student, labels alone", student, steps, held_out.student_labels_alone),
        ("student, eager loss", student, steps, held_out.student_eager),
        ("student, fastkd.kd_loss", student, steps, held_out.student_fastkd),
        ("student, fastkd.kd_loss of heads", student, steps, held_out.student_heads),
        ("student, the same of the int8 teacher", student, steps, held_out.student_int8),
    ):
        if loss is None:
            continue
        table.add_row(name, parameters, trained, f"{loss:.3f}", f"{math.exp(loss):,.0f}")
    return table
