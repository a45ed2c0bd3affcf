"""A vocabulary of 32k: one student trained twice, with the loss people write today and with ``fastkd.kd_loss``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fastkd

from .. import native
from . import memory
from .corpus import IGNORE, Corpus, draw, load
from .language_model import LanguageModel
from .settings import TextSettings

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the student's logits, the teacher's and the target
WARM_UP = 2  # first steps, which the medians leave out


@dataclass(frozen=True)
class Curve:
    """What one way of computing the loss gave: the loss at every step, and medians over the steps."""

    losses: list[float]
    loss_milliseconds: float
    step_milliseconds: float
    peak_megabytes: float | None  # None where the system has no such number


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy in nats per token on texts that no model was trained on."""

    token_frequencies: float
    teacher: float
    student_untrained: float
    student_labels_alone: float
    student_eager: float
    student_fastkd: float


@dataclass(frozen=True)
class TextResult:
    vocabulary: int
    train_tokens: int
    held_out_tokens: int
    evaluated_tokens: int
    rows_per_step: int
    implementation: str
    teacher_parameters: int
    student_parameters: int
    teacher_steps: int
    eager: Curve
    fastkd: Curve
    largest_difference: float  # between the two losses of a step, relative
    compared_steps: int
    tolerance: float
    held_out: HeldOut
    seconds: float

    def problem(self) -> str | None:
        """Why this is no success: both ways have to give the same number, step after step."""
        if self.largest_difference <= self.tolerance:  # False of NaN
            return None
        return (
            f"text: the losses of eager and fastkd differ by {self.largest_difference:.1e} (relative) within "
            f"{self.compared_steps} steps, allowed is {self.tolerance:.0e}"
        )


def run(settings: TextSettings, seed: int, progress: Progress) -> TextResult:
    started = time.perf_counter()
    bar = progress.add_task("text: tokens", total=1)
    corpus = load(settings.vocabulary, settings.source_files)
    progress.advance(bar)

    teacher = _model(settings, corpus, settings.teacher_width, seed)
    bar = progress.add_task("text: teacher", total=settings.teacher_steps)
    for _ in train_on_labels(teacher, settings, corpus, settings.teacher_steps, settings.teacher_lr, seed):
        progress.advance(bar)
    alone = _model(settings, corpus, settings.student_width, seed)
    untrained = held_out_loss(alone, settings, corpus)
    bar = progress.add_task("text: student, labels alone", total=settings.student_steps)
    for _ in train_on_labels(alone, settings, corpus, settings.student_steps, settings.student_lr, seed):
        progress.advance(bar)
    bar = progress.add_task("text: student, eager and fastkd in turns", total=settings.student_steps)
    eager, fast = (Student(settings, corpus, loss, seed) for loss in (eager_loss(settings), fastkd_loss(settings)))
    for _ in train_in_turns(eager, fast, teacher, settings, corpus, seed):
        progress.advance(bar)

    return TextResult(
        vocabulary=corpus.vocabulary,
        train_tokens=len(corpus.train),
        held_out_tokens=len(corpus.held_out),
        evaluated_tokens=settings.evaluation_batches * settings.batch * (settings.window - 1),
        rows_per_step=settings.batch * settings.window,
        implementation=implementation(),
        teacher_parameters=_size(teacher),
        student_parameters=_size(alone),
        teacher_steps=settings.teacher_steps,
        eager=eager.curve(),
        fastkd=fast.curve(),
        largest_difference=largest_difference(eager.losses, fast.losses, settings.compared_steps),
        compared_steps=min(settings.compared_steps, settings.student_steps),
        tolerance=settings.tolerance,
        held_out=HeldOut(
            token_frequencies=corpus.unigram_loss(),
            teacher=held_out_loss(teacher, settings, corpus),
            student_untrained=untrained,
            student_labels_alone=held_out_loss(alone, settings, corpus),
            student_eager=held_out_loss(eager.model, settings, corpus),
            student_fastkd=held_out_loss(fast.model, settings, corpus),
        ),
        seconds=time.perf_counter() - started,
    )


def eager_loss(settings: TextSettings) -> Loss:
    """What people write today. A padded row has to be kept out of both terms, hence no ``reduction="batchmean"``."""
    alpha, temperature = settings.alpha, settings.temperature

    def log_probabilities(logits: Tensor) -> Tensor:
        # Nobody who trains at temperature 1 pays for the division, so neither does this.
        return F.log_softmax(logits if temperature == 1 else logits / temperature, -1)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        hard = F.cross_entropy(student.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        log_q, log_p = log_probabilities(student), log_probabilities(teacher)
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        counts = target != IGNORE
        soft = temperature**2 * (divergence * counts).sum() / counts.sum()
        return alpha * hard + (1 - alpha) * soft

    return loss


def fastkd_loss(settings: TextSettings) -> Loss:
    """The same in one call. The logits are needed by nobody else, so the gradient may take their place."""
    return lambda student, teacher, target: fastkd.kd_loss(
        student,
        teacher,
        target,
        alpha=settings.alpha,
        temperature=settings.temperature,
        ignore_index=IGNORE,
        overwrite_student=True,
    )


class Student:
    """A student in training with one of the losses, and what was measured, one number per step."""

    def __init__(self, settings: TextSettings, corpus: Corpus, loss: Loss, seed: int) -> None:
        self.model = _model(settings, corpus, settings.student_width, seed)
        self.optimizer, self.schedule = _optimizer(self.model, settings.student_lr, settings.student_steps)
        self.loss = loss
        self.losses: list[float] = []
        self.loss_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.peak_bytes: list[int | None] = []

    def step(self, teacher: nn.Module, inputs: Tensor, target: Tensor) -> None:
        peak = memory.Peak()
        started = time.perf_counter()
        with torch.no_grad():
            knowledge = teacher(inputs)
        logits = self.model(inputs)
        # Backward in two halves, so that the loss can be timed down to the gradient of the logits, without the model.
        loss_started = time.perf_counter()
        loss = self.loss(logits, knowledge, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        loss_ended = time.perf_counter()
        logits.backward(gradient)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step_seconds.append(time.perf_counter() - started)
        self.loss_seconds.append(loss_ended - loss_started)
        self.peak_bytes.append(peak.bytes())
        self.losses.append(loss.item())

    def curve(self) -> Curve:
        peaks = [peak for peak in self.peak_bytes[WARM_UP:] if peak is not None]
        return Curve(
            losses=self.losses,
            loss_milliseconds=1e3 * statistics.median(self.loss_seconds[WARM_UP:]),
            step_milliseconds=1e3 * statistics.median(self.step_seconds[WARM_UP:]),
            peak_megabytes=statistics.median(peaks) / 1e6 if peaks else None,
        )


def train_in_turns(
    eager: Student, fast: Student, teacher: nn.Module, settings: TextSettings, corpus: Corpus, seed: int
) -> Iterator[None]:
    """Both take each batch before the next is drawn, by turns in front: what disturbs the one disturbs the other."""
    batches = _batches(settings, corpus, seed)
    for step in range(settings.student_steps):
        inputs, target = next(batches)
        for student in (eager, fast) if step % 2 else (fast, eager):
            student.step(teacher, inputs, target)
        yield


def train_on_labels(
    model: nn.Module, settings: TextSettings, corpus: Corpus, steps: int, lr: float, seed: int
) -> Iterator[None]:
    optimizer, schedule = _optimizer(model, lr, steps)
    batches = _batches(settings, corpus, seed)
    for _ in range(steps):
        inputs, target = next(batches)
        optimizer.zero_grad()
        fastkd.cross_entropy(model(inputs), target, overwrite_student=True).backward()
        optimizer.step()
        schedule.step()
        yield


def held_out_loss(model: nn.Module, settings: TextSettings, corpus: Corpus) -> float:
    generator = torch.Generator().manual_seed(0)  # the same windows for every model and every seed
    losses = []
    with torch.no_grad():
        for _ in range(settings.evaluation_batches):
            inputs, target = draw(corpus.held_out, settings.batch, settings.window, generator)
            losses.append(fastkd.cross_entropy(model(inputs), target).item())
    return statistics.fmean(losses)


def largest_difference(eager: Sequence[float], fast: Sequence[float], steps: int) -> float:
    """Relative to eager. NaN if any difference is."""
    a, b = torch.tensor(eager[:steps], dtype=torch.float64), torch.tensor(fast[:steps], dtype=torch.float64)
    return ((a - b).abs() / a.abs()).max().item()


def implementation() -> str:
    """Who computes the logit losses on a CPU here."""
    if (reason := native.missing()) is not None:
        return f"eager PyTorch ({reason})"
    return f"the C++ kernels ({native.extension().instruction_set()})"


def _batches(settings: TextSettings, corpus: Corpus, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(corpus.train, settings.batch, settings.window, generator)


def _model(settings: TextSettings, corpus: Corpus, width: int, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(corpus.log_frequency(), settings.window, width)


def _optimizer(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The rate rises over the first ten steps and then falls to a fiftieth at the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * max(0.02, 1 - step / steps))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
