"""The demo's networks as int8 layers: what they still know, how small they are, and how fast."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .. import int8
from . import digits, text
from .corpus import draw, load
from .language_model import LanguageModel, WithHead
from .settings import DigitsSettings, Settings, TextSettings

BATCHES = (1, 32)
REPEAT = 7


@dataclass(frozen=True)
class Int8Row:
    """One network, before and after :func:`fastkd.int8.quantize_`; sizes and times are those of the first seed."""

    name: str
    metric: str
    float_score: list[float]  # one per seed
    int8_score: list[float]
    sqnr: list[float]  # of the outputs of the largest batch, in dB
    float_bytes: int
    int8_bytes: int
    float_milliseconds: dict[int, float]  # by the size of the batch
    int8_milliseconds: dict[int, float]

    def means(self) -> dict[str, tuple[float, float]]:
        """Mean and spread, also of what each network loses."""
        change = [after - before for before, after in zip(self.float_score, self.int8_score, strict=True)]
        columns = {"float": self.float_score, "int8": self.int8_score, "change": change, "sqnr": self.sqnr}
        return {name: (statistics.fmean(values), digits.spread(values)) for name, values in columns.items()}


class ConvNetwork(nn.Module):
    """Convolutions with norms, on digits of 8 x 8 pixels that come as rows of 64."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (1, width, 2 * width, 2 * width)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in zip(sizes, sizes[1:], (1, 2, 2), strict=False)
        ]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(2 * width, digits.CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        maps = self.layers(rows.reshape(-1, 1, 8, 8))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


def run(settings: Settings, parts: Sequence[str], progress: Progress) -> list[Int8Row]:
    """Train small networks with each seed, and measure each as it was trained and with int8 layers."""
    found = []
    if "digits" in parts:
        found += of_digits(settings.digits, settings.seeds, progress)
    if "text" in parts:
        found.append(of_text(settings.text, settings.seeds, progress))
    return found


@digits.one_thread()
def of_digits(settings: DigitsSettings, seeds: Sequence[int], progress: Progress) -> list[Int8Row]:
    data = digits.load()
    everything, loss = torch.arange(len(data.train)), digits.labels_loss(data)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "digits, linear": lambda: digits.Network(settings.teacher_hidden),
        "digits, convolutions": ConvNetwork,
    }
    bar = progress.add_task("int8: digits", total=len(kinds) * len(seeds) * settings.teacher_steps)

    def trained(kind: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = kinds[kind]()
        numbers = settings.teacher_steps, settings.batch, settings.teacher_lr, seed
        for _ in digits.train(network, loss, data, everything, *numbers):
            progress.advance(bar)
        return network

    return [
        compare(
            kind,
            "accuracy %",
            [partial(trained, kind, seed) for seed in seeds],
            lambda model: digits.accuracy(model, data),
            lambda n: data.test[:n],
        )
        for kind in kinds
    ]


def of_text(settings: TextSettings, seeds: Sequence[int], progress: Progress) -> Int8Row:
    """Students of labels alone."""
    corpus = load(settings.vocabulary, settings.source_files)
    inputs, _ = draw(corpus.held_out, max(BATCHES), settings.window, torch.Generator().manual_seed(0))
    bar = progress.add_task("int8: text", total=len(seeds) * settings.student_steps)

    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = LanguageModel(corpus.log_frequency(), settings.window, settings.student_width)
        for _ in text.train_on_labels(model, settings, corpus, settings.student_steps, settings.student_lr, seed):
            progress.advance(bar)
        return WithHead(model)

    return compare(
        "text, transformer",
        "nats per token",
        [partial(trained, seed) for seed in seeds],
        lambda model: text.held_out_loss(model, settings, corpus),
        lambda n: inputs[:n],
    )


def compare(
    name: str,
    metric: str,
    networks: Sequence[Callable[[], nn.Module]],
    score: Callable[[nn.Module], float],
    batch: Callable[[int], Tensor],
) -> Int8Row:
    scores: list[tuple[float, float]] = []
    reports: list[dict[int, int8.Report]] = []
    for make in networks:
        network = make().eval()
        rounded = copy.deepcopy(network)
        int8.quantize_(rounded)
        repeat = 0 if reports else REPEAT
        reports.append({n: int8.report(rounded, network, batch(n), repeat=repeat) for n in BATCHES})
        scores.append((score(network), score(rounded)))
    first = reports[0]
    before, after = zip(*scores, strict=True)
    return Int8Row(
        name=name,
        metric=metric,
        float_score=list(before),
        int8_score=list(after),
        sqnr=[report[max(BATCHES)].sqnr for report in reports],
        float_bytes=first[max(BATCHES)].float_bytes,
        int8_bytes=first[max(BATCHES)].bytes,
        float_milliseconds={n: report.float_milliseconds or 0.0 for n, report in first.items()},
        int8_milliseconds={n: report.milliseconds or 0.0 for n, report in first.items()},
    )


def print_rows(console: Console, rows: Sequence[Int8Row]) -> None:
    table = Table(title="The same networks with int8 layers", title_style="bold")
    table.add_column("network")
    headings = ["score", "float", "int8", "change", "SQNR dB", "KiB float / int8"]
    for heading in [*headings, *(f"ms, batch {n}: float / int8" for n in BATCHES)]:
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{row.float_milliseconds[n]:.3f} / {row.int8_milliseconds[n]:.3f}" for n in BATCHES]
        size = f"{row.float_bytes / 1024:,.0f} / {row.int8_bytes / 1024:,.0f}"
        means = row.means()
        shown = [_shown(means[name], 1 if name == "sqnr" else 2) for name in ("float", "int8", "change", "sqnr")]
        table.add_row(row.name, row.metric, *shown, size, *times)
    seeds = len(rows[0].float_score) if rows else 0
    table.caption = f"Mean ± standard deviation of {seeds} seeds; no batch was seen before, every layer is Dynamic()."
    console.print(table)


def _shown(mean_and_spread: tuple[float, float], digits: int) -> str:
    mean, std = mean_and_spread
    return f"{mean:.{digits}f} ± {std:.{digits}f}"
