"""Few labels, many inputs: a small network learns handwritten digits from 60 labels, with and without a teacher."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastkd

from ..distill import Distiller, Linear, Term
from .settings import DigitsSettings
from .terms import TERMS

CLASSES = 10
IGNORE = -100
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of these logits, made from these rows of the training set


@dataclass(frozen=True)
class DigitsResult:
    teacher_parameters: int
    student_parameters: int
    train_rows: int
    test_rows: int
    labels: int
    teacher_accuracy: float  # on the test rows, in percent
    labels_alone: list[float]  # the students', one per seed
    distilled: list[float]
    seconds: float
    terms: dict[str, list[float]] = field(default_factory=dict)  # students of labels and one term on features

    def gain(self) -> float:
        return statistics.fmean(self.distilled) - statistics.fmean(self.labels_alone)

    def problem(self) -> str | None:
        """Why this is no success: the gain has to exceed the spreads of both students together."""
        noise = spread(self.labels_alone) + spread(self.distilled)
        if self.gain() > noise:
            return None
        return f"digits: distillation gains {self.gain():.1f} points, not more than the spread of {noise:.1f} points"


@dataclass(frozen=True)
class Digits:
    train: Tensor  # (rows, 64), in [0, 1]
    train_target: Tensor
    test: Tensor
    test_target: Tensor


def load() -> Digits:
    images, target = load_digits(return_X_y=True)
    halves = train_test_split(images / 16, target, test_size=0.5, random_state=0, stratify=target)
    train, test, train_target, test_target = (torch.from_numpy(half) for half in halves)
    return Digits(train.float(), train_target.long(), test.float(), test_target.long())


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small lose far more to threads waiting for one another than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run(settings: DigitsSettings, seeds: tuple[int, ...], progress: Progress) -> DigitsResult:
    started = time.perf_counter()
    data = load()
    everything = torch.arange(len(data.train))
    bar = progress.add_task("digits: teacher", total=settings.teacher_steps)
    teacher = network(settings.teacher_hidden, seed=0)
    hard = labels_loss(data)
    for _ in train(
        teacher, hard, data, everything, settings.teacher_steps, settings.batch, settings.teacher_lr, seed=0
    ):
        progress.advance(bar)
    with torch.no_grad():
        knowledge = teacher(data.train)

    bar = progress.add_task("digits: students", total=2 * len(seeds) * settings.student_steps)
    accuracies: tuple[list[float], list[float]] = ([], [])
    for seed in seeds:
        labelled = choose_labelled(data.train_target, settings.labels_per_class, seed)
        soft = distillation_loss(settings, data, labelled, knowledge)
        for loss, rows, collected in ((hard, labelled, accuracies[0]), (soft, everything, accuracies[1])):
            student = network(settings.student_hidden, seed)
            for _ in train(
                student, loss, data, rows, settings.student_steps, settings.batch, settings.student_lr, seed
            ):
                progress.advance(bar)
            collected.append(accuracy(student, data))
    of_terms: dict[str, list[float]] = {}
    if settings.terms:
        bar = progress.add_task("digits: terms", total=len(TERMS) * len(seeds))
        for name, terms in TERMS.items():
            of_terms[name] = []
            for seed in seeds:
                of_terms[name].append(taught_by(terms(), settings, data, teacher, seed))
                progress.advance(bar)
    return DigitsResult(
        teacher_parameters=_size(teacher),
        student_parameters=_size(student),
        train_rows=len(data.train),
        test_rows=len(data.test),
        labels=len(labelled),
        teacher_accuracy=accuracy(teacher, data),
        labels_alone=accuracies[0],
        distilled=accuracies[1],
        seconds=time.perf_counter() - started,
        terms=of_terms,
    )


def taught_by(terms: list[Term], settings: DigitsSettings, data: Digits, teacher: nn.Module, seed: int) -> float:
    """The accuracy of a student of the labels and these terms, of all inputs: it never sees the teacher's logits."""
    student = network(settings.student_hidden, seed)
    target = torch.full_like(data.train_target, IGNORE)
    labelled = choose_labelled(data.train_target, settings.labels_per_class, seed)
    target[labelled] = data.train_target[labelled]
    Distiller(student, teacher, [Term(fastkd.cross_entropy, ignore_index=IGNORE), *terms]).fit(
        TensorDataset(data.train, target),
        steps=settings.student_steps,
        batch_size=settings.batch,
        drop_last=True,  # relations of the two rows that are left over weigh as much as those of all others
        optimizer=partial(torch.optim.Adam, lr=settings.student_lr),
        lr_scheduler=Linear(1.0, 0.05),
        seed=seed,
        progress=False,
    )
    return accuracy(student, data)


def labels_loss(data: Digits) -> Loss:
    return lambda logits, rows: F.cross_entropy(logits, data.train_target[rows])


def distillation_loss(settings: DigitsSettings, data: Digits, labelled: Tensor, knowledge: Tensor) -> Loss:
    """The teacher speaks about every input; a row without a label takes any valid id and alpha 0."""
    target = torch.zeros_like(data.train_target)
    target[labelled] = data.train_target[labelled]
    alpha = torch.zeros(len(target))
    alpha[labelled] = settings.alpha
    return lambda logits, rows: fastkd.kd_loss(
        logits, knowledge[rows], target[rows], alpha=alpha[rows], temperature=settings.temperature
    )


def choose_labelled(target: Tensor, per_class: int, seed: int) -> Tensor:
    """The rows whose label is known: as many of every class."""
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[target[order] == digit][:per_class] for digit in range(CLASSES)])


class Network(nn.Module):
    """Fully connected."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (64, *hidden)
        self.body = nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))
        self.head = nn.Linear(sizes[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def network(hidden: tuple[int, ...], seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(hidden)


def train(
    model: nn.Module,
    loss: Loss,
    data: Digits,
    rows: Tensor,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> Iterator[None]:
    """Yields after every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        chosen = rows[torch.randperm(len(rows), generator=generator)[:batch]]
        optimizer.zero_grad()
        loss(model(data.train[chosen]), chosen).backward()
        optimizer.step()
        schedule.step()
        yield


def accuracy(model: nn.Module, data: Digits) -> float:
    with torch.no_grad():
        right: Tensor = model(data.test).argmax(1) == data.test_target
    return 100 * right.float().mean().item()


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
