"""Where the batches of training come from, and how a run that goes on finds its place in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .. import _checks
from . import ranks
from .random_states import get_states, set_states
from .sampling import EpochBatches, batches_of
from .settings import Settings


def source_of(train: Any, settings: Settings, device: torch.device) -> OwnLoader | UsersLoader:
    if isinstance(train, DataLoader) or hasattr(train, "state_dict"):
        return UsersLoader(train)
    if isinstance(train, IterableDataset) or not (hasattr(train, "__len__") and hasattr(train, "__getitem__")):
        _checks.bad_type("fit", "train", "be a dataset with a length, or a DataLoader", type(train).__name__)
    return OwnLoader(train, settings, device)


class OwnLoader:
    """A DataLoader of a dataset. What it gives is a function of the seed, the epoch and the number of the batch."""

    def __init__(self, dataset: Dataset[Any], settings: Settings, device: torch.device) -> None:
        self.sampler = EpochBatches(
            len(dataset),  # type: ignore[arg-type]
            settings.batch_size,
            shuffle=settings.shuffle,
            drop_last=settings.drop_last,
            seed=settings.seed,
            rank=ranks.rank(),
            ranks=ranks.count(),
        )
        self.length = self.sampler.batches
        if self.length == 0:
            _checks.bad_value("fit", "train", "have a batch of rows", f"{self.sampler.rows} rows")
        pin = device.type == "cuda"
        self.loader = batches_of(dataset, self.sampler, settings.num_workers, settings.collate_fn, pin)
        self.fingerprint = {"rows": self.sampler.rows, "batch_size": settings.batch_size, "seed": settings.seed}
        self.fingerprint |= {"shuffle": settings.shuffle, "drop_last": settings.drop_last}

    def open(self, epoch: int, position: int) -> Iterator[Any]:
        self.sampler.epoch, self.sampler.position = epoch, position
        return iter(self.loader)

    def any_batch(self) -> Any:
        self.sampler.epoch = self.sampler.position = 0
        return self.loader.dataset[next(iter(self.sampler))]

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class UsersLoader:
    """A DataLoader as it was given.

    To go on in the middle of an epoch the random states are those of the epoch's beginning, the batches that were used
    are read once more and left, and the random states are those of the checkpoint. So the rest is the same if order
    and content of the batches depend on these states, on the loader's generator, or on ``set_epoch``. A loader with
    ``state_dict`` finds its place by itself.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
        self.keeps_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self.length = None if iterable else len(loader)
        self.fingerprint: dict[str, Any] = {"batches": self.length}
        if self.length == 0:
            _checks.bad_value("fit", "train", "have a batch", "an empty loader")
        self._begun: dict[str, Any] = {}  # the states when the epoch began
        self._own: dict[str, Any] = {}  # a loader's that keeps its own

    def open(self, epoch: int, position: int) -> Iterator[Any]:
        for sampler in (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            follow = getattr(sampler, "set_epoch", None)
            if follow is not None:
                follow(epoch)
        if position == self.length:
            return iter(())
        if position and self.keeps_state:
            self.loader.load_state_dict(self._own)
            return iter(self.loader)
        if position and self.length is None:
            raise RuntimeError(
                "fit: a loader of an IterableDataset cannot go on in the middle of an epoch: give one with state_dict "
                "and load_state_dict, or save at the ends of epochs alone"
            )
        generator = self._generator()
        if position:
            self._restore(generator)
        else:
            self._begun = {"states": get_states()}
            if generator is not None:
                self._begun["generator"] = generator.get_state()
        batches: Iterator[Any] = iter(self.loader)
        for _ in range(position):
            next(batches)
        return batches

    def any_batch(self) -> Any:
        """The first one. What reading it changed is put back."""
        states, generator = get_states(), self._generator()
        before = None if generator is None else generator.get_state()
        own = self.loader.state_dict() if self.keeps_state else None
        batch = next(iter(self.loader))
        set_states(states)
        if generator is not None and before is not None:
            generator.set_state(before)
        if own is not None:
            self.loader.load_state_dict(own)
        return batch

    def _generator(self) -> torch.Generator | None:
        found: torch.Generator | None = getattr(self.loader, "generator", None)
        return found if found is not None else getattr(getattr(self.loader, "sampler", None), "generator", None)

    def _restore(self, generator: torch.Generator | None) -> None:
        set_states(self._begun["states"])
        if generator is not None and "generator" in self._begun:
            generator.set_state(self._begun["generator"])

    def state(self) -> dict[str, Any]:
        if self.keeps_state:
            return {"own": self.loader.state_dict()}
        return {"begun": self._begun, "generator": None if (g := self._generator()) is None else g.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        self._own, self._begun = state.get("own", {}), state.get("begun", {})
        generator = self._generator()
        if generator is not None and state.get("generator") is not None:
            generator.set_state(state["generator"])
