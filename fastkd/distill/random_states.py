"""The random states that a run depends on: to put them back, and to hold them still."""

# ruff: noqa: NPY002
# The legacy generator is what augmentations draw from.

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_states(device: torch.device | None = None) -> dict[str, Any]:
    """Of Python, numpy and torch, and of this CUDA device, as a checkpoint can hold them."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_states(states: dict[str, Any], device: torch.device | None = None) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *others = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(states["torch"])
    if device is not None and "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def mixed(*numbers: int) -> int:
    """A seed made of several numbers, for example of seed, epoch and batch."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python, numpy and torch's CPU generator begin with this seed, and go on afterwards as if nothing had been."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
