"""The order of batches, and the random numbers in them, are functions of seed, epoch and number alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fastkd.distill.random_states import get_states, mixed, seeded, set_states
from fastkd.distill.sampling import EpochBatches, batches_of


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        return index, random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def taken(sampler: EpochBatches) -> list[list[int]]:
    return [rows for _, rows in sampler]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_each_row_once_an_epoch_in_another_order() -> None:
    sampler = EpochBatches(11, 4, seed=3)
    first = taken(sampler)
    assert [len(rows) for rows in first] == [4, 4, 3]
    assert sorted(flat(first)) == list(range(11))
    assert taken(sampler) == first, "the same again"
    sampler.epoch = 1
    assert taken(sampler) != first
    assert taken(EpochBatches(11, 4, seed=4)) != first
    assert taken(EpochBatches(11, 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [len(rows) for rows in taken(EpochBatches(11, 4, drop_last=True))] == [4, 4]


@pytest.mark.parametrize("position", range(4))
def test_the_rest_of_an_epoch(position: int) -> None:
    whole, rest = EpochBatches(11, 4, seed=3), EpochBatches(11, 4, seed=3)
    rest.position = position
    assert list(rest) == list(whole)[position:]
    assert len(rest) == len(list(rest))


@pytest.mark.parametrize(("rows", "ranks"), [(12, 2), (11, 2), (9, 2), (13, 3), (11, 5), (3, 5)])
def test_ranks_share_the_batches_of_one_process(rows: int, ranks: int) -> None:
    alone = taken(EpochBatches(rows, 4 * ranks, seed=5))
    shared = [taken(EpochBatches(rows, 4, seed=5, rank=rank, ranks=ranks)) for rank in range(ranks)]
    together = [flat(parts) for parts in zip(*shared, strict=True)]
    rest = rows % (4 * ranks)
    assert together == (alone[:-1] if 0 < rest < ranks else alone)
    assert all(part for one in shared for part in one), "no rank has an empty batch"


def test_augmentation_is_the_same_in_any_process() -> None:
    found = []
    for workers in (0, 2):
        loader = batches_of(Noise(), EpochBatches(11, 4, seed=3), workers, list, False)
        before = torch.get_rng_state()
        found.append([list(loader), list(loader)])
        assert torch.equal(torch.get_rng_state(), before), "dropout sees nothing of it"
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    values = [row[1:] for batch in found[0][0] for row in batch]
    assert len(set(values)) == 11


def test_states_can_be_written_and_put_back() -> None:
    states = get_states()

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()  # noqa: NPY002

    first = draw()
    between = get_states()
    with seeded(7):
        inside = draw()
    after = get_states()
    assert after["python"] == between["python"]
    assert torch.equal(after["torch"], between["torch"])
    set_states(states)
    assert draw() == first
    with seeded(7):
        assert draw() == inside != first


def test_mixed_numbers_differ() -> None:
    assert len({mixed(*numbers) for numbers in ((0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1,))}) == 5
    assert 0 <= mixed(3) < 2**63
