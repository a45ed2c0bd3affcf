"""Batches of a dataset whose order and random numbers depend on the seed and the place in training alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .random_states import mixed, seeded

Numbered = tuple[int, list[int]]  # the seed of a batch, and its rows


class EpochBatches(Sampler[Numbered]):
    """The rows of each batch of ``epoch``, from its batch number ``position`` on.

    The order is a function of (seed, epoch), so that a run which goes on in the middle of an epoch reads nothing before
    it. Of several ranks each takes its part of every batch of ``batch_size * ranks`` rows: together they take the steps
    that one process would. The rows of the last batch are divided as evenly as can be; too few for all ranks are left
    out.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size * ranks, shuffle, seed
        self.rank, self.ranks = rank, ranks
        rest = rows % self.batch_size
        self.batches = rows // self.batch_size + (rest >= ranks and not drop_last)
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return self.batches - self.position

    def __iter__(self) -> Iterator[Numbered]:
        order = list(range(self.rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
            order = torch.randperm(self.rows, generator=generator).tolist()
        for number in range(self.position, self.batches):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            begin, end = (len(whole) * rank // self.ranks for rank in (self.rank, self.rank + 1))
            yield mixed(self.seed, self.epoch, number, self.rank), whole[begin:end]


class SeededBatches(Dataset[Any]):
    """A dataset's batches, for which augmentations and ``collate`` draw the same numbers in any process."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, numbered: Numbered) -> Any:
        seed, indices = numbered
        with seeded(seed):
            several = getattr(self.dataset, "__getitems__", None)
            rows: list[Any] = several(indices) if several is not None else [self.dataset[index] for index in indices]
            return self.collate(rows)


def batches_of(
    dataset: Dataset[Any],
    sampler: Sampler[Numbered],
    workers: int,
    collate: Callable[[list[Any]], Any] | None,
    pin_memory: bool,
) -> DataLoader[Any]:
    return DataLoader(
        SeededBatches(dataset, collate or default_collate),
        batch_size=None,  # an item is a batch
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,  # else numpy's arrays would become tensors
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each epoch would draw from the generator that dropout draws from
    )


def _as_it_is(batch: Any) -> Any:
    return batch
