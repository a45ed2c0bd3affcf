"""The picture of a run. Drawn without pyplot: no window, no global state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .digits import DigitsResult
from .int8 import Int8Row
from .report import ratio
from .text import TextResult

GREY, BLUE, ORANGE, GREEN, VIOLET, RED = "#8a8f98", "#2563a8", "#d97706", "#15803d", "#7c3aed", "#be123c"


def draw(path: Path, digits: DigitsResult | None, text: TextResult | None, int8: Sequence[Int8Row] = ()) -> None:
    panels: list[Callable[[Axes], None]] = []
    if digits is not None:
        panels.append(lambda axes: _accuracy(axes, digits))
        if digits.terms:
            panels.append(lambda axes: _terms(axes, digits))
    if text is not None:
        panels += [
            lambda axes: _curves(axes, text),
            lambda axes: _costs(axes, text),
            lambda axes: _held_out(axes, text),
        ]
    if int8:
        panels.append(lambda axes: _int8(axes, int8))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(6.4 * columns, 4.4 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), dpi=130
    )
    FigureCanvasAgg(figure)
    figure.suptitle("fastkd demo", fontsize=15, fontweight="bold")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes)
    figure.savefig(path)


def _accuracy(axes: Axes, result: DigitsResult) -> None:
    names = (f"{result.labels} labels,\ncross-entropy", f"{result.labels} labels and the teacher,\nfastkd.kd_loss")
    for place, (values, colour) in enumerate(((result.labels_alone, GREY), (result.distilled, GREEN))):
        mean = statistics.fmean(values)
        across = [place + 0.07 * (i - (len(values) - 1) / 2) for i in range(len(values))]
        axes.scatter(across, values, color=colour, s=42, alpha=0.8, zorder=3, label="one seed" if place == 0 else "")
        axes.hlines(mean, place - 0.25, place + 0.25, color=colour, linewidth=2.5, label="mean" if place == 0 else "")
        axes.annotate(f"{mean:.1f} %", (place + 0.28, mean), va="center", color=colour, fontsize=12, fontweight="bold")
    axes.axhline(result.teacher_accuracy, color=BLUE, linestyle="--", label=f"teacher, {result.teacher_accuracy:.1f} %")
    axes.set_xticks([0, 1], names)
    axes.set_xlim(-0.5, 1.6)
    axes.set_ylim(top=100)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"Handwritten digits: a student of {result.student_parameters:,} parameters")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="lower right", frameon=False)


def _terms(axes: Axes, result: DigitsResult) -> None:
    every = [("labels alone", result.labels_alone, GREY)]
    every += [(name.replace(" + ", " +\n"), values, VIOLET) for name, values in result.terms.items()]
    every.append(("kd_loss", result.distilled, GREEN))
    for place, (_, values, colour) in enumerate(every):
        mean = statistics.fmean(values)
        axes.scatter(values, [place] * len(values), color=colour, s=26, alpha=0.5)
        axes.plot(mean, place, "|", color=colour, markersize=20, markeredgewidth=3)
        axes.annotate(f"{mean:.1f}", (mean, place), (0, 11), textcoords="offset points", ha="center", fontweight="bold")
    axes.set_yticks(range(len(every)), [name for name, _, _ in every])
    axes.set_ylim(len(every) - 0.5, -0.7)
    axes.set_xlabel("test accuracy (%), a dot a seed, a bar their mean")
    axes.set_title(f"What features teach beside {result.labels} labels")
    axes.grid(alpha=0.25)


def _curves(axes: Axes, result: TextResult) -> None:
    steps = range(1, len(result.eager.losses) + 1)
    axes.plot(steps, result.eager.losses, color=ORANGE, linewidth=5, alpha=0.45, label="eager PyTorch")
    axes.plot(steps, result.fastkd.losses, color=BLUE, linewidth=1.5, label="fastkd.kd_loss")
    if result.heads is not None:
        label = "fastkd.kd_loss of heads"
        axes.plot(steps, result.heads.losses, color=VIOLET, linewidth=1.5, linestyle=(0, (2, 2)), label=label)
    if result.int8 is not None:
        axes.plot(steps, result.int8.losses, color=RED, linewidth=1, label="the same, int8 teacher")
    axes.set_xlabel("training step")
    axes.set_ylabel("distillation loss (nats per token)")
    axes.set_title(f"The same curve: largest relative difference {result.largest_difference:.0e}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _costs(axes: Axes, result: TextResult) -> None:
    """Bars relative to eager, since milliseconds and megabytes share no axis; the numbers stand on the bars."""
    quantities = (
        ("loss,\nforward + backward", "loss_milliseconds", "ms"),
        ("whole\ntraining step", "step_milliseconds", "ms"),
        ("peak memory\nbeside weights", "peak_megabytes", "MB"),
    )
    shown = [quantity for quantity in quantities if ratio(result, result.fastkd, quantity[1]) is not None]
    bars = [(result.eager, ORANGE, "eager PyTorch"), (result.fastkd, BLUE, "fastkd")]
    if result.heads is not None:
        bars.append((result.heads, VIOLET, "fastkd, heads"))
    if result.int8 is not None:
        bars.append((result.int8, RED, "int8 teacher"))
    width = 0.76 / len(bars)
    for place, (_, field, unit) in enumerate(shown):
        for number, (curve, colour, _) in enumerate(bars):
            if curve in (result.heads, result.int8) and field == "loss_milliseconds":
                continue  # the matmuls of the heads are in it, which the others do elsewhere
            value = getattr(curve, field)
            across, share = place + (number - (len(bars) - 1) / 2) * width, 100 * value / getattr(result.eager, field)
            axes.bar(across, share, width=0.9 * width, color=colour, alpha=0.85)
            label, size = f"{value:,.0f} {unit}", 10 if len(bars) < 4 else 7
            axes.annotate(label, (across, share), (0, 3), textcoords="offset points", ha="center", fontsize=size)
    for _, colour, label in bars:
        axes.bar(0, 0, color=colour, label=label)
    axes.set_xticks(range(len(shown)), [name for name, _, _ in shown])
    axes.set_ylim(0, 125 if len(bars) < 4 else 140)
    axes.set_ylabel("relative to eager (%)")
    axes.set_title(f"What it costs: {result.rows_per_step} tokens, vocabulary {result.vocabulary:,}")
    axes.legend(frameon=False, loc="upper right", ncols=2 if len(bars) > 3 else len(bars))


def _held_out(axes: Axes, result: TextResult) -> None:
    held_out = result.held_out
    every = (
        ("student untrained", held_out.student_untrained, GREY),
        ("student, labels alone", held_out.student_labels_alone, GREY),
        ("student, eager KD", held_out.student_eager, ORANGE),
        ("student, fastkd", held_out.student_fastkd, BLUE),
        ("student, fastkd, heads", held_out.student_heads, VIOLET),
        ("student, int8 teacher", held_out.student_int8, RED),
        ("teacher", held_out.teacher, GREEN),
        ("teacher, int8", held_out.teacher_int8, RED),
    )
    points = [(name, loss, colour) for name, loss, colour in every if loss is not None]
    lowest, highest = (choose(loss for _, loss, _ in points) for choose in (min, max))
    for place, (_, loss, colour) in enumerate(points):
        axes.plot(loss, place, "o", color=colour, markersize=11)
        axes.annotate(f"{loss:.2f}", (loss, place), (11, 0), textcoords="offset points", va="center", fontweight="bold")
    axes.set_yticks(range(len(points)), [name for name, _, _ in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_xlim(lowest - 0.15 * (highest - lowest), highest + 0.25 * (highest - lowest))
    axes.grid(alpha=0.25)
    axes.set_xlabel("held-out cross-entropy (nats per token), lower is better")
    axes.set_title(f"What the student learned in {len(result.fastkd.losses)} steps")


def _int8(axes: Axes, rows: Sequence[Int8Row]) -> None:
    """Bars relative to float; the numbers stand on the bars."""
    every = [
        ("size", GREY, [(row.float_bytes / 1024, row.int8_bytes / 1024, "KiB") for row in rows]),
        *(
            (f"time, batch {n}", colour, [(row.float_milliseconds[n], row.int8_milliseconds[n], "ms") for row in rows])
            for n, colour in zip(rows[0].int8_milliseconds, (BLUE, RED), strict=True)
        ),
    ]
    for number, (label, colour, values) in enumerate(every):
        for place, (before, after, unit) in enumerate(values):
            across, share = place + 0.27 * (number - 1), 100 * after / before
            axes.bar(across, share, width=0.24, color=colour, alpha=0.85, label=label if place == 0 else "")
            text = f"{after:,.0f}" if after >= 100 else f"{after:.3g}"
            axes.annotate(
                f"{text}\n{unit}", (across, share), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.axhline(100, color=GREY, linestyle="--", linewidth=1)
    names = [f"{row.name}\n{row.means()['float'][0]:.2f} to {row.means()['int8'][0]:.2f}\n{row.metric}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(0, 1.3 * max(100, *(100 * after / before for *_, values in every for before, after, _ in values)))
    axes.set_ylabel("relative to float (%)")
    axes.set_title("The same networks with int8 layers")
    axes.legend(frameon=False, loc="upper right", ncols=3)
