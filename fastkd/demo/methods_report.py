"""The tables of every way of distilling."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import maps, methods
from .digits import spread
from .settings import Settings


@dataclass(frozen=True)
class MethodsResult:
    connected: dict[str, list[float]]  # accuracy by method, one per seed
    maps: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by task and method

    def problem(self) -> str | None:
        """Why this is no success: over the seeds, the best has to gain more than two standard errors on plain KD."""
        gains = differences(self.connected[methods.BEST], self.connected[methods.PLAIN])
        mean, error = statistics.fmean(gains), spread(gains) / len(gains) ** 0.5
        if mean > 2 * error:
            return None
        return f"methods: {methods.BEST!r} gains {mean:.2f} points on plain KD, not two standard errors of {error:.2f}"


def run(settings: Settings, progress: Progress) -> MethodsResult:
    total = len(settings.seeds) * (len(methods.METHODS) + 2 * len(maps.terms_of("", 1.0, 1.0)))
    bar = progress.add_task("digits: every method", total=total)
    arguments = settings.digits, settings.seeds, lambda: progress.advance(bar)
    return MethodsResult(methods.run(*arguments), maps.run(*arguments))


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(first, second, strict=True)]


def print_methods(console: Console, result: MethodsResult, settings: Settings) -> None:
    labels = 10 * settings.digits.labels_per_class
    connected = f"Every method, {labels} labelled images"
    _print(console, connected, "accuracy %", result.connected, methods.PLAIN, methods.BEST)
    for task, scores in result.maps.items():
        _print(console, task.capitalize(), maps.UNITS[task], scores, maps.PLAIN, None)


def _print(
    console: Console, title: str, unit: str, scores: Mapping[str, list[float]], plain: str, best: str | None
) -> None:
    table = Table(title=title, title_style="bold")
    table.add_column("student of")
    for heading in (unit, "more than plain KD, seed by seed"):
        table.add_column(heading, justify="right")
    for name, values in scores.items():
        gain = "" if name in (plain, "teacher") else _shown(differences(values, scores[plain]), "+")
        shown = _shown(values) if len(values) > 1 else f"{values[0]:.1f}"
        table.add_row(name, f"[bold green]{shown}[/]" if name == best else shown, gain)
    table.caption = f"Mean ± standard deviation of {len(scores[plain])} seeds; all students see the same images."
    console.print(table)


def _shown(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.1f} ± {spread(values):.1f}"


def as_json(result: MethodsResult) -> dict[str, Any]:
    every = {"connected": result.connected, **result.maps}
    means = {task: {name: (statistics.fmean(v), spread(v)) for name, v in one.items()} for task, one in every.items()}
    return {**every, "mean_and_spread": means}
