"""The demo's networks as int8 layers: what they still know, how small they are, and how fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import int8
from . import digits, text
from .corpus import Corpus, draw, load
from .language_model import LanguageModel
from .settings import DigitsSettings, Settings, TextSettings

BATCHES = (1, 32)
REPEAT = 7


@dataclass(frozen=True)
class Int8Row:
    """One network, before and after :func:`fastkd.int8.quantize_`."""

    name: str
    metric: str
    float_score: float
    int8_score: float
    float_bytes: int
    int8_bytes: int
    sqnr: float  # of the outputs of the largest batch, in dB
    float_milliseconds: dict[int, float]  # by the size of the batch
    int8_milliseconds: dict[int, float]


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


class WithHead(nn.Module):
    """The language model with its output as a layer of its own, which shares its weight with the embedding."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        vocabulary, width = model.token.weight.shape
        self.head = nn.Linear(width, vocabulary, device="meta")
        self.head.weight, self.head.bias = model.token.weight, model.bias

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.model.hidden(ids))
        return logits


def run(settings: Settings) -> list[Int8Row]:
    """Train a few small networks, and measure each as it was trained and with int8 layers."""
    seed = settings.seeds[0]
    corpus = load(settings.text.vocabulary, settings.text.source_files)
    return [
        *of_digits(settings.digits, seed),
        of_text(trained_text(settings.text, corpus, seed), settings.text, corpus),
    ]


@digits.one_thread()
def of_digits(settings: DigitsSettings, seed: int) -> list[Int8Row]:
    data = digits.load()
    rows = torch.arange(len(data.train))
    torch.manual_seed(seed)
    networks = {"digits, linear": digits.network(settings.teacher_hidden, seed), "digits, convolutions": ConvNetwork()}
    found = []
    for name, network in networks.items():
        loss, steps = digits.labels_loss(data), settings.teacher_steps
        for _ in digits.train(network, loss, data, rows, steps, settings.batch, settings.teacher_lr, seed):
            pass
        found.append(
            compare(name, network, "accuracy %", lambda model: digits.accuracy(model, data), lambda n: data.test[:n])
        )
    return found


def trained_text(settings: TextSettings, corpus: Corpus, seed: int) -> LanguageModel:
    """A student, from labels alone."""
    torch.manual_seed(seed)
    model = LanguageModel(corpus.log_frequency(), settings.window, settings.student_width)
    for _ in text.train_on_labels(model, settings, corpus, settings.student_steps, settings.student_lr, seed):
        pass
    return model


def of_text(model: LanguageModel, settings: TextSettings, corpus: Corpus) -> Int8Row:
    inputs, _ = draw(corpus.held_out, max(BATCHES), settings.window, torch.Generator().manual_seed(0))
    return compare(
        "text, transformer",
        WithHead(model),
        "nats per token",
        lambda model: text.held_out_loss(model, settings, corpus),
        lambda n: inputs[:n],
    )


def compare(
    name: str, network: nn.Module, metric: str, score: Callable[[nn.Module], float], batch: Callable[[int], Tensor]
) -> Int8Row:
    rounded = copy.deepcopy(network.eval())
    int8.quantize_(rounded)
    reports = {n: int8.report(rounded, network, batch(n), repeat=REPEAT) for n in BATCHES}
    largest = reports[max(BATCHES)]
    return Int8Row(
        name=name,
        metric=metric,
        float_score=score(network),
        int8_score=score(rounded),
        float_bytes=largest.float_bytes,
        int8_bytes=largest.bytes,
        sqnr=largest.sqnr,
        float_milliseconds={n: report.float_milliseconds or 0.0 for n, report in reports.items()},
        int8_milliseconds={n: report.milliseconds or 0.0 for n, report in reports.items()},
    )


def print_rows(console: Console, rows: list[Int8Row]) -> None:
    table = Table(title="The same networks with int8 layers", title_style="bold")
    table.add_column("network")
    headings = ["score", "float", "int8", "SQNR dB", "KiB float", "KiB int8"]
    for heading in [*headings, *(f"ms, batch {n}: float / int8" for n in BATCHES)]:
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{row.float_milliseconds[n]:.3f} / {row.int8_milliseconds[n]:.3f}" for n in BATCHES]
        sizes = [f"{size / 1024:,.0f}" for size in (row.float_bytes, row.int8_bytes)]
        scores = [f"{row.float_score:.2f}", f"{row.int8_score:.2f}", f"{row.sqnr:.1f}"]
        table.add_row(row.name, row.metric, *scores, *sizes, *times)
    console.print(table)
