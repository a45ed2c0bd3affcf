"""The loop of :func:`fastkd.distill.fit`: steps, evaluations and checkpoints, from wherever a run was left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import _checks
from . import modes, ranks
from .accumulation import rows_of, scales
from .bar import Bar
from .batches import mapped
from .best import Best
from .distiller import Distiller
from .evaluation import evaluate
from .finite import Watch
from .group import Group, members, terms_of
from .metrics import Metrics
from .precision import Precision
from .records import Records
from .result import Result
from .schedules import Schedule
from .settings import Settings
from .sources import OwnLoader, UsersLoader


class Loop:
    """One run. What it has to remember, :class:`Records` writes and puts back."""

    def __init__(
        self,
        distiller: Distiller | Group,
        source: OwnLoader | UsersLoader,
        val: Iterable[Any] | None,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        total: int,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.distiller, self.source, self.val = distiller, source, val
        self.optimizer, self.scheduler = optimizer, scheduler
        self.total, self.settings, self.device = total, settings, device
        self.precision = Precision(settings.precision, device)
        self.best = Best(settings.monitor, settings.mode, settings.patience, settings.min_delta)
        self.watch = Watch(device)
        self.step = self.epoch = self.position = 0
        self.evaluated = 0  # the step of the last evaluation
        self.metrics: dict[str, float] = {}  # what it said
        self.records = Records(self)
        self.model = _distributed(distiller)
        self.log: Metrics  # opened by run, where it is known from which step on
        self._logged = 0, 0.0  # the last step that was logged, and when

    def run(self) -> Result:
        with modes.kept(self.distiller), self.records.claimed():
            batches = self.records.resume()
            modes.train(self.distiller)
            folder = self.settings.folder if ranks.rank() == 0 else None
            self.log = Metrics(folder, self.step, self.evaluated, self.settings.tensorboard)
            self.bar = Bar(self.settings.progress, self.total, self.step)
            self._forget_gradients()  # a step that was interrupted has left some
            try:
                self._train(batches)
            finally:
                self.log.close()
                self.bar.close()
            self.records.finish()
            del self.records  # it knows this loop: the loader's workers would wait for the garbage collector
        early = self.best.exhausted and self.step < self.total
        return Result(
            step=self.step,
            epoch=self.epoch,
            stopped_early=early,
            metrics=dict(self.metrics),
            best_step=self.best.step,
            best=dict(self.best.metrics),
            folder=self.settings.folder,
        )

    @property
    def done(self) -> bool:
        return self.step >= self.total or self.best.exhausted

    def _train(self, batches: Iterator[Any] | None) -> None:
        self._logged = self.step, time.perf_counter()
        begun = self.step
        while not self.done:
            if batches is None:
                batches = self.source.open(self.epoch, self.position)
            self._train_epoch(batches)
            batches = None
        if self.step > begun or self.evaluated < self.step:
            self._evaluate()
            self.records.save()

    def _train_epoch(self, batches: Iterator[Any]) -> None:
        """To its end, or to that of training."""
        before = self.step
        while group := list(islice(batches, self.settings.accumulate)):
            self._step(group)
            self.position += len(group)
            if _due(self.settings.evaluate_every, self.step):
                self._evaluate()
            if _due(self.settings.save_every, self.step):
                self.records.save()
            if self.done and self.position != self.source.length:
                return
        if self.position == 0:
            raise RuntimeError(f"fit: train gave no batch in epoch {self.epoch}")
        self.epoch, self.position = self.epoch + 1, 0
        if self.settings.evaluate_every is None:
            self._evaluate()
        if self.settings.save_every is None and self.step > before:
            self.records.save()

    def _step(self, group: list[Any]) -> None:
        self.distiller.set_progress(self.step, self.total)
        batches = [mapped(lambda tensor: tensor.to(self.device, non_blocking=True), batch) for batch in group]
        loss: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for index, (batch, scale) in enumerate(zip(batches, scales(self.distiller, batches, self.device), strict=True)):
            with self._synchronised(index == len(batches) - 1):
                with self.precision.autocast(), _said_of_one_row(batch):
                    one, of_terms = self.model(batch, normalizer=scale.normalizer, share=scale.share)
                self.precision.backward(one)
            loss = one.detach() if loss is None else loss + one.detach()
            for name, part in of_terms.items():
                parts[name] = parts[name] + part if name in parts else part
        assert loss is not None
        self.watch.see(self.step, loss, parts)
        logged = (self.step + 1) % self.settings.log_every == 0 or self.step + 1 == self.total
        rates = [group["lr"] for group in self.optimizer.param_groups]
        norm = self._update(logged)
        self.step += 1
        self.bar.advance()
        if logged:
            self._log(loss, parts, norm, rates, sum(map(rows_of, batches)) * ranks.count())

    def _update(self, logged: bool) -> Tensor | None:
        """The optimizer's step and the scheduler's. Returns the norm of the gradient before it was clipped."""
        norm, stepped = None, True
        if all(p.grad is None for one in self._learners() for p in one.parameters()):
            self.optimizer.step()  # of nothing, as every term has weight 0: a scheduler counts it all the same
        else:
            self.precision.unscale(self.optimizer)
            norm = self._clip()
            if self.precision.scaler is None:  # a scaler leaves such a step out
                self.watch.see_gradient(self.step, norm)
            if logged:
                self.watch.check()
            stepped = self.precision.step(self.optimizer)
        if stepped and self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self._forget_gradients()
        return norm

    def _clip(self) -> Tensor:
        """The norm is needed in each step, as no NaN may reach a weight or a checkpoint."""
        norms = []
        for one in self._learners():
            own = [parameter for parameter in one.parameters() if parameter.grad is not None]
            if not own:  # the weights of a student's terms may all be 0
                continue
            norms.append(nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]))
            if self.settings.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(own, self.settings.clip_norm, norms[-1])
        norm: Tensor = torch.stack(norms).norm()
        return norm

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.distiller.zero_grad(set_to_none=True)  # of parameters, too, that the optimizer does not hold

    def _learners(self) -> list[Distiller]:
        """Whose gradients are clipped each by itself."""
        return [one for _, one in members(self.distiller)]

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over ranks with the last batch of a step."""
        wrapped = next((m for m in self.model.modules() if isinstance(m, DistributedDataParallel)), None)
        return nullcontext() if last or wrapped is None else wrapped.no_sync()

    def _log(self, loss: Tensor, parts: dict[str, Tensor], norm: Tensor | None, rates: list[Any], rows: int) -> None:
        """One wait for the device for all numbers of the row."""
        numbers = [loss, *parts.values(), *([] if norm is None else [norm])]
        values = iter(torch.stack([number.to(loss.dtype) for number in numbers]).tolist())
        row: dict[str, float | None] = {"step": self.step, "epoch": self.epoch, "loss": next(values)}
        known = {name: next(values) for name in parts}
        terms = terms_of(self.distiller)
        row |= {f"term/{name}": known.get(name) for name in terms}
        row |= {f"weight/{name}": weight for name, weight in self.distiller.weights().items()}
        for name, term in terms.items():
            value = term.options.get("temperature")
            if isinstance(value, Schedule):
                value = value.value(self.step - 1, self.total)
            if isinstance(value, (int, float)):
                row[f"temperature/{name}"] = float(value)
        row |= {f"lr/{i}" if i else "lr": float(rate) for i, rate in enumerate(rates)}
        row["grad_norm"] = next(values) if norm is not None else None
        (step, before), now = self._logged, time.perf_counter()
        row["rows_per_second"] = rows * (self.step - step) / max(now - before, 1e-9)
        self._logged = self.step, now
        self.log.train(row)
        self.bar.show(loss=row["loss"])

    def _evaluate(self) -> None:
        """Once a step at most."""
        if (self.val is None and not self.settings.evaluate) or self.evaluated == self.step:
            return
        started = time.perf_counter()
        self.distiller.set_progress(self.step - 1, self.total)
        found = evaluate(self.distiller, self.val, self.settings.evaluate, self.precision, self.device)
        self.metrics = ranks.from_first(found)
        self.evaluated = self.step
        # A term of weight 0 is not evaluated, and has its column all the same.
        terms = [] if self.val is None else [f"term/{name}" for name in terms_of(self.distiller)]
        absent = {name: None for name in terms if name not in self.metrics}
        self.log.val({"step": self.step, "epoch": self.epoch, **self.metrics, **absent})
        better = self.best.update(self.step, self.metrics)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(self.metrics[self.best.monitor or "loss"])
        if better:
            self.records.keep_best()
        self._logged = self._logged[0], self._logged[1] + time.perf_counter() - started


@contextmanager
def _said_of_one_row(batch: Any) -> Iterator[None]:
    """What to do where torch knows only that BatchNorm has one value: it is an epoch's last batch mostly."""
    try:
        yield
    except ValueError as error:
        if rows_of(batch) == 1 and "more than 1 value per channel" in str(error):
            rule = "give BatchNorm more than one row (drop_last=True leaves out a small last batch)"
            _checks.bad_value("fit", "train", rule, 1)
        raise


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _distributed(distiller: Distiller | Group) -> nn.Module:
    wrapped = any(isinstance(module, DistributedDataParallel) for module in distiller.modules())
    if ranks.count() == 1 or wrapped:
        return distiller
    # A term of weight 0 leaves its adapter without a gradient, and one on features the student's head.
    return DistributedDataParallel(distiller, find_unused_parameters=True)
