"""Speed against eager code, one panel a machine, one group of bars a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "eager": "#9a9a9a",
    "compiled": "#e0a458",
    "liger": "#b8686b",
    "fastkd": "#4f8fc0",
    "fastkd-overwrite": "#1f4e79",
}


def speed(panels: Mapping[str, Sequence[Mapping[str, str]]], path: Path, title: str) -> None:
    """``panels``: title -> rows of one divergence and mode, with one row for each provider and vocabulary."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (heading, rows) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, rows)
        axis.set_title(heading, fontsize=10)
    axes[0][0].set_ylabel("times as fast as eager PyTorch")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the name of the library's version in it, the file changes when the numbers do.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _panel(axis: plt.Axes, rows: Sequence[Mapping[str, str]]) -> None:
    vocabularies = sorted({int(row["vocab"]) for row in rows})
    speeds = {(row["provider"], int(row["vocab"])): float(row["times_eager"]) for row in rows if row["times_eager"]}
    providers = [name for name in COLOURS if any(provider == name for provider, _ in speeds)]
    width = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        places = [k + (i - (len(providers) - 1) / 2) * width for k in range(len(vocabularies))]
        heights = [speeds.get((provider, vocab), 0.0) for vocab in vocabularies]
        bars = axis.bar(places, heights, width * 0.95, label=provider, color=COLOURS[provider])
        labels = [f"{height:.1f}" if height else "" for height in heights]
        axis.bar_label(bars, labels, fontsize=7, padding=1)
    axis.set_xticks(range(len(vocabularies)), [f"{vocab:,}" for vocab in vocabularies])
    axis.set_xlabel("vocabulary")
    axis.axhline(1, color="#606060", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    axis.legend(fontsize=8, frameon=False)
