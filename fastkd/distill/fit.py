"""A small, complete training loop that goes on where it was killed: :func:`fit`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from .. import _checks
from .batches import mapped
from .schedules import Schedule
from .settings import Evaluates, MakesOptimizer, MakesScheduler, Settings

if TYPE_CHECKING:
    from .distiller import Distiller
    from .group import Group
    from .result import Result


def fit(
    distiller: Distiller | Group,
    train: Any,
    val: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    optimizer: MakesOptimizer | None = None,
    lr_scheduler: MakesScheduler | None = None,
    batch_size: int = 32,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
    precision: str | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    evaluate: Evaluates | Mapping[str, Evaluates] | None = None,
    evaluate_every: int | None = None,
    monitor: str | None = None,
    mode: str = "min",
    patience: int | None = None,
    min_delta: float = 0.0,
    keep: str = "last",
    out: str | os.PathLike[str] | None = None,
    resume: bool | str = False,
    save_every: int | None = None,
    log_every: int = 10,
    tensorboard: bool = False,
    progress: bool | None = None,
) -> Result:
    """Train the student of a Distiller, or those of a Group. Also ``distiller.fit(...)``. Same as::

        optimizer = optimizer(distiller.parameters())
        for epoch in range(epochs):
            for batch in DataLoader(train, batch_size, shuffle=True):
                loss, parts = distiller.loss(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            evaluate(student)

    With ``out=`` and ``resume="auto"`` the same call goes on where it was killed, and ends with the weights that it
    would have ended with: bit for bit on a CPU, with the same number of threads. Model, adapters, optimizer,
    schedulers, random states, place in the data and best evaluation are in ``last.pt``, which is replaced whole; the
    files of metrics are cut back to its step.

    Terms' schedules and ``lr_scheduler`` count optimizer steps. A submodule of which no parameter learns is in
    evaluation mode during training too: its dropout is off, and its BatchNorm keeps its statistics. Modes are put back
    at the end.

    In a distributed run every process calls this with the same arguments. Gradients are averaged over the processes so
    that a step is that of all their rows together; each evaluates for itself, and rank 0 decides and writes. In the
    end all have its statistics of BatchNorm, too.

    Args:
        distiller: What computes the loss. Adapters that are missing are made from the first batch.
        train: A dataset with a length, from which batches are drawn in an order that depends on ``seed`` and epoch
            alone; random augmentations in it and in ``collate_fn`` are seeded by batch, in any number of workers. Or a
            DataLoader, used as it is: to go on within an epoch it reads again what was used, which gives the same rest
            if its order depends on torch's random state, its own ``generator``, or ``set_epoch``. One of an
            IterableDataset can go on between epochs alone, unless it has ``state_dict`` and ``load_state_dict``.
        val: A dataset or a loader, of which the loss, each term and, where logits and labels fit, the accuracy are
            evaluated, with the weights that the terms have at that step. Where all of these are 0, the loss is NaN,
            which is never the best.
        epochs, steps: How long; one of the two. A step is one of the optimizer's.
        optimizer: A function of the list of parameters that learn, as ``functools.partial(torch.optim.SGD, lr=0.1)``;
            or an optimizer, made after ``distiller.prepare``. ``torch.optim.AdamW`` with its defaults if left out.
        lr_scheduler: A function of the optimizer, or a scheduler: it steps after every optimizer step,
            ``ReduceLROnPlateau`` after every evaluation. Or a :class:`Schedule`, by which the learning rates are
            multiplied: ``Cosine(1.0, 0.0)``.
        batch_size: Rows of a batch, in each process; for a dataset, as ``shuffle``, ``drop_last``, ``num_workers`` and
            ``collate_fn``, which are those of a DataLoader.
        seed: Of the order of the rows and of their augmentation. Dropout draws from torch's generator as it is.
        precision: ``"bfloat16"`` or ``"float16"`` (with a GradScaler) for ``torch.autocast``.
        accumulate: So many batches make a step. Terms that mean over labels are divided by the labels that count in all
            of them; other terms are weighted by the rows of each batch.
        clip_norm: The gradient's norm is at most this.
        evaluate: A function of the student, in evaluation mode and without gradients, that returns a number or a dict
            of numbers; or a dict of such functions by name. Of a Group, the students are an ``nn.ModuleDict``.
        evaluate_every: In steps; at the end of every epoch if left out. And at the end of training.
        monitor: The metric that says which evaluation is best: ``"loss"``, or the first one if there is no ``val``.
        mode: ``"min"`` or ``"max"``.
        patience: Stop after so many evaluations that are not better than that before them by more than ``min_delta``.
        keep: Which weights the student has at the end, the ``"last"`` or the ``"best"``.
        out: A folder for checkpoints and metrics; see :class:`Result`. A lock on it keeps a second run out until this
            one ends, or its process however that ends. Windows, and file systems without locks, leave that to you.
        resume: ``"auto"`` goes on if ``out`` holds a run, True demands one, False refuses one. ``epochs`` or ``steps``
            may be others than before; what decides about the data may not. The optimizer's settings, as its learning
            rate, are those of the checkpoint.
        save_every: In steps; at the end of every epoch if left out. And with every evaluation that is the best so far.
        log_every: In steps. Metrics are those of that step.
        tensorboard: Write events too, to ``out/tensorboard``.
        progress: Show a bar; by default on a terminal, where tqdm is installed.

    Returns:
        A :class:`Result`.

    Raises:
        TypeError, ValueError: a wrong argument; a run in ``out`` with other settings, or one that is going on.
        OSError: ``out`` cannot be written to.
        FloatingPointError: a loss or a gradient became NaN. On a CPU the optimizer has not used it; elsewhere it is
            seen at the next step that is logged, and before a checkpoint is written.
        RuntimeError: something is not installed; a loader that cannot go on where it was.

    Example:
        >>> from fastkd import kd_loss
        >>> from fastkd.distill import Distiller, Term
        >>> rows = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randint(2, (20,)))
        >>> distiller = Distiller(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), [Term(kd_loss, temperature=2.0)])
        >>> distiller.fit(rows, epochs=3, batch_size=10).step
        6
    """
    settings = Settings(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=collate_fn,
        seed=seed,
        precision=precision,
        accumulate=accumulate,
        clip_norm=clip_norm,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        monitor=monitor,
        mode=mode,
        patience=patience,
        min_delta=min_delta,
        keep=keep,
        out=out,
        resume=resume,
        save_every=save_every,
        log_every=log_every,
        tensorboard=tensorboard,
        progress=progress,
    )
    return _run(distiller, train, val, optimizer, lr_scheduler, settings)


def _run(
    distiller: Distiller | Group,
    train: Any,
    val: Any,
    optimizer: MakesOptimizer | None,
    lr_scheduler: MakesScheduler | None,
    settings: Settings,
) -> Result:
    from .evaluation import loader_of  # these know Distiller, of which this is a method
    from .group import members
    from .loop import Loop
    from .sources import source_of

    device = next(distiller.parameters()).device
    source = source_of(train, settings, device)
    if any(one._missing() for _, one in members(distiller)):
        distiller.prepare(mapped(lambda tensor: tensor.to(device), source.any_batch()))
    optimizer = _optimizer(distiller, optimizer)
    total = _steps(source.length, settings)
    scheduler = _scheduler(optimizer, lr_scheduler, total)
    if val is None and not settings.evaluate:
        for name in ("patience", "monitor"):
            if (given := getattr(settings, name)) is not None:
                _checks.bad_value("fit", name, "have a val or an evaluate to go by", given)
    if settings.keep == "best" and val is None and not settings.evaluate:
        _checks.bad_value("fit", "keep", 'be "last" without a val or an evaluate', repr(settings.keep))
    if isinstance(scheduler, ReduceLROnPlateau) and val is None and not settings.evaluate:
        _checks.bad_value("fit", "lr_scheduler", "have a val or an evaluate to go by", type(scheduler).__name__)
    return Loop(distiller, source, loader_of(val, settings), optimizer, scheduler, total, settings, device).run()


def _optimizer(distiller: Distiller | Group, given: MakesOptimizer | None) -> torch.optim.Optimizer:
    if not isinstance(given, torch.optim.Optimizer):
        learning = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        given = torch.optim.AdamW(learning) if given is None else given(learning)
        if not isinstance(given, torch.optim.Optimizer):
            _checks.bad_type("fit", "optimizer", "return an optimizer", type(given).__name__)
    distiller.check_optimizer(given)
    return given


def _scheduler(optimizer: torch.optim.Optimizer, given: MakesScheduler | None, total: int) -> LRScheduler | None:
    if given is None:
        return None
    if isinstance(given, LRScheduler):
        if given.optimizer is not optimizer:
            rule = "be made for the optimizer that is given, or a function that makes it"
            _checks.bad_value("fit", "lr_scheduler", rule, f"{type(given).__name__} of another")
        return given
    if isinstance(given, Schedule):
        schedule = given
        return LambdaLR(optimizer, lambda step: schedule.value(step, total))
    made = given(optimizer)
    if not isinstance(made, LRScheduler):
        _checks.bad_type("fit", "lr_scheduler", "return a scheduler", type(made).__name__)
    return made


def _steps(batches: int | None, settings: Settings) -> int:
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    if batches is None:
        _checks.bad_value("fit", "steps", "be given for a loader without a length, and not epochs", settings.epochs)
    return settings.epochs * math.ceil(batches / settings.accumulate)
