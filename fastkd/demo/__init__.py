"""``fastkd demo``: distillation on data that needs no download, with the numbers to judge it by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import digits, int8, methods_report, plot, report, text
from .settings import PARTS, Settings

__all__ = ["PARTS", "Settings", "run"]


def run(out: Path, parts: Sequence[str] = PARTS, settings: Settings | None = None) -> int:
    """Run these parts and leave demo.json and demo.png in ``out``. 1 if distillation did not do what it promises."""
    settings = Settings() if settings is None else settings
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        digits_result = digits.run(settings.digits, settings.seeds, progress) if "digits" in parts else None
        text_result = text.run(settings.text, settings.seeds[0], progress) if "text" in parts else None
        int8_rows = int8.run(settings, parts, progress) if settings.int8 else []
        wanted = settings.digits.methods and "digits" in parts
        methods_result = methods_report.run(settings, progress) if wanted else None

    problems = []
    if digits_result is not None:
        report.print_digits(console, digits_result)
        problems.append(digits_result.problem())
    if methods_result is not None:
        methods_report.print_methods(console, methods_result, settings)
        problems.append(methods_result.problem())
    if text_result is not None:
        report.print_text(console, text_result)
        problems.append(text_result.problem())
    if int8_rows:
        int8.print_rows(console, int8_rows)
    # Written after a failure too: the curves say more than the message.
    report.write_json(out / "demo.json", settings, digits_result, text_result, int8_rows, methods_result)
    plot.draw(out / "demo.png", digits_result, text_result, int8_rows)
    console.print(f"Wrote {out / 'demo.json'} and {out / 'demo.png'}", highlight=False, soft_wrap=True)

    failures = [problem for problem in problems if problem is not None]
    for failure in failures:
        console.print(f"[bold red]FAILED[/] {failure}", soft_wrap=True)
    return 1 if failures else 0
