"""A vocabulary of 32k: one student trained twice, with the loss people write today and with ``fastkd.kd_loss``.

If asked for, a third time with :class:`fastkd.Head` in place of the logits, and a fourth time like that from a teacher
whose layers are int8.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fastkd

from .. import native
from . import memory
from .corpus import IGNORE, Corpus, draw, load
from .language_model import LanguageModel, WithHead, rounded
from .settings import TextSettings

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the student's logits, the teacher's and the target
HeadsLoss: TypeAlias = Callable[[fastkd.Head, fastkd.Head, Tensor], Tensor]
Timed: TypeAlias = tuple[Tensor, float]  # a loss, and the seconds that it and its gradient took
INT8 = "int8 teacher"
WARM_UP = 2  # first steps, which the medians leave out


class Way(Protocol):
    """How a step gets its loss: in the end all of the student's parameters have their gradients."""

    def backward(self, student: LanguageModel, teacher: LanguageModel, inputs: Tensor, target: Tensor) -> Timed: ...


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
    student_heads: float | None = None  # None: not trained
    teacher_int8: float | None = None
    student_int8: float | None = None


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
    heads: Curve | None = None  # with logits that are not stored
    int8: Curve | None = None  # the same, of a teacher that is int8
    int8_difference: float | None = None  # of its losses from eager's, relative

    def curves(self) -> dict[str, Curve]:
        """By the name of the one who computed the loss."""
        curves = {"eager": self.eager, "fastkd": self.fastkd, "heads": self.heads, INT8: self.int8}
        return {name: curve for name, curve in curves.items() if curve is not None}

    def compared(self) -> list[str]:
        """Those that have the same teacher, and so the same losses."""
        return [name for name in self.curves() if name != INT8]

    def problem(self) -> str | None:
        """Why this is no success: all ways have to give the same number, step after step."""
        if self.largest_difference <= self.tolerance:  # False of NaN
            return None
        *names, last = self.compared()
        return (
            f"text: the losses of {', '.join(names)} and {last} differ by {self.largest_difference:.1e} (relative) "
            f"within {self.compared_steps} steps, allowed is {self.tolerance:.0e}"
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
    ways: dict[str, Way] = {"eager": Logits(eager_loss(settings)), "fastkd": Logits(fastkd_loss(settings))}
    if settings.heads:
        ways["heads"] = Heads(heads_loss(settings))
    if settings.int8:
        ways[INT8] = RoundedHeads(heads_loss(settings), rounded(teacher))
    students = {name: Student(settings, corpus, way, seed) for name, way in ways.items()}
    bar = progress.add_task(f"text: students in turns: {', '.join(ways)}", total=settings.student_steps)
    for _ in train_in_turns(list(students.values()), teacher, settings, corpus, seed):
        progress.advance(bar)
    return _result(settings, corpus, teacher, alone, untrained, students, started)


def _result(
    settings: TextSettings,
    corpus: Corpus,
    teacher: LanguageModel,
    alone: LanguageModel,
    untrained: float,
    students: dict[str, Student],
    started: float,
) -> TextResult:
    eager, fast, heads, int8 = (students.get(name) for name in ("eager", "fastkd", "heads", INT8))
    assert eager is not None
    assert fast is not None

    def difference(*others: Student | None) -> float:
        return max_or_nan(
            largest_difference(eager.losses, other.losses, settings.compared_steps) for other in others if other
        )

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
        largest_difference=difference(fast, heads),
        compared_steps=min(settings.compared_steps, settings.student_steps),
        tolerance=settings.tolerance,
        held_out=HeldOut(
            token_frequencies=corpus.unigram_loss(),
            teacher=held_out_loss(teacher, settings, corpus),
            student_untrained=untrained,
            student_labels_alone=held_out_loss(alone, settings, corpus),
            student_eager=held_out_loss(eager.model, settings, corpus),
            student_fastkd=held_out_loss(fast.model, settings, corpus),
            student_heads=held_out_loss(heads.model, settings, corpus) if heads else None,
            teacher_int8=held_out_loss(rounded(teacher), settings, corpus) if int8 else None,
            student_int8=held_out_loss(int8.model, settings, corpus) if int8 else None,
        ),
        seconds=time.perf_counter() - started,
        heads=heads.curve() if heads else None,
        int8=int8.curve() if int8 else None,
        int8_difference=difference(int8) if int8 else None,
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


def heads_loss(settings: TextSettings) -> HeadsLoss:
    """The same of logits that are computed a few rows at a time, and with them the gradients behind them."""
    return lambda student, teacher, target: fastkd.kd_loss(
        student, teacher, target, alpha=settings.alpha, temperature=settings.temperature, ignore_index=IGNORE
    )


class Logits:
    """A loss of stored logits, timed down to their gradient, without the model."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def backward(self, student: LanguageModel, teacher: LanguageModel, inputs: Tensor, target: Tensor) -> Timed:
        with torch.no_grad():
            knowledge = teacher(inputs)
        logits = student(inputs)
        started = time.perf_counter()
        loss = self.loss(logits, knowledge, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        seconds = time.perf_counter() - started
        logits.backward(gradient)
        return loss.detach(), seconds


class Heads:
    """A loss of two heads. Its time includes the matmuls of both, which are not in that of :class:`Logits`."""

    def __init__(self, loss: HeadsLoss) -> None:
        self.loss = loss

    def backward(self, student: LanguageModel, teacher: LanguageModel, inputs: Tensor, target: Tensor) -> Timed:
        with torch.no_grad():
            taught = self.taught(teacher, inputs)
        hidden = student.hidden(inputs)
        # A leaf of its own, because the head's weight is the embedding too, which hidden states lead back to.
        states, weights = hidden.detach().requires_grad_(), (student.token.weight, student.bias)
        started = time.perf_counter()
        loss = self.loss(fastkd.Head(states, *weights), taught, target)
        loss.backward()
        seconds = time.perf_counter() - started
        hidden.backward(states.grad)
        return loss.detach(), seconds

    def taught(self, teacher: LanguageModel, inputs: Tensor) -> fastkd.Head:
        return fastkd.Head(teacher.hidden(inputs), teacher.token.weight, teacher.bias)


class RoundedHeads(Heads):
    """The same with a teacher that is int8, its head too, in place of the one that is given."""

    def __init__(self, loss: HeadsLoss, teacher: WithHead) -> None:
        super().__init__(loss)
        self.teacher = teacher

    def taught(self, teacher: LanguageModel, inputs: Tensor) -> fastkd.Head:
        return fastkd.Head.from_layer(self.teacher.head, self.teacher.model.hidden(inputs))


class Student:
    """A student in training with one of the losses, and what was measured, one number per step."""

    def __init__(self, settings: TextSettings, corpus: Corpus, way: Way, seed: int) -> None:
        self.model = _model(settings, corpus, settings.student_width, seed)
        self.optimizer, self.schedule = _optimizer(self.model, settings.student_lr, settings.student_steps)
        self.way = way
        self.losses: list[float] = []
        self.loss_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.peak_bytes: list[int | None] = []

    def step(self, teacher: LanguageModel, inputs: Tensor, target: Tensor) -> None:
        peak = memory.Peak()
        started = time.perf_counter()
        loss, loss_seconds = self.way.backward(self.model, teacher, inputs, target)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step_seconds.append(time.perf_counter() - started)
        self.loss_seconds.append(loss_seconds)
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
    students: Sequence[Student], teacher: LanguageModel, settings: TextSettings, corpus: Corpus, seed: int
) -> Iterator[None]:
    """All take each batch before the next is drawn, by turns in front: what disturbs one disturbs the others."""
    batches = _batches(settings, corpus, seed)
    for step in range(settings.student_steps):
        inputs, target = next(batches)
        for student in students if step % 2 else reversed(students):
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


def max_or_nan(values: Iterable[float]) -> float:
    return torch.tensor(list(values), dtype=torch.float64).max().item()


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
