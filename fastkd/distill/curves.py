"""The picture of a run. Drawn without pyplot: no window, no global state."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from . import checkpoint, metrics

Rows = list[dict[str, float | None]]
HIDDEN = ("step", "epoch", "rows_per_second")


def draw(folder: Path) -> Path | None:
    """``curves.png`` of what the run has written so far; None without matplotlib, or before there is a row."""
    train, val = metrics.rows(folder, metrics.TRAIN), metrics.rows(folder, metrics.VAL)
    if importlib.util.find_spec("matplotlib") is None or not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"loss": [("loss", train)]}
    if val and "loss" in val[0]:
        panels["loss"].append(("loss", val))
    panels["terms, before their weights"] = [(name, train) for name in train[0] if name.startswith("term/")]
    panels["gradient norm"] = [("grad_norm", train)]
    panels["learning rate"] = [(name, train) for name in train[0] if name.partition("/")[0] == "lr"]
    for name in val[0] if val else ():
        if name not in HIDDEN and name != "loss" and not name.startswith("term/"):
            panels[f"evaluation: {name}"] = [(name, val)]
    count = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 3.6 * count), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, (title, lines) in enumerate(panels.items(), start=1):
        _panel(figure.add_subplot(count, 2, number), title, lines, val)
    path = folder / "curves.png"
    checkpoint.replace(path, lambda file: figure.savefig(file, format="png"))
    return path


def _panel(axes: Any, title: str, lines: list[tuple[str, Rows]], val: Rows) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    for name, rows in lines:
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        of_val = rows is val
        label = f"{name}, evaluated" if of_val else name.removeprefix("term/")
        if known:  # a term of weight 0 has no numbers, and a step without a term no gradient
            axes.plot(*zip(*known, strict=True), marker="o" if of_val else "", markersize=3, label=label)
    if axes.has_data():
        axes.legend(fontsize=8)
