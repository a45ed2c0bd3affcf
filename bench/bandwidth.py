"""The roof of memory-bound code: how fast this machine copies, measured in the same rounds as all others."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

CACHES_PER_BUFFER = 4
GPU_BUFFER = 2**30
UNKNOWN_CACHE = 64 * 2**20


class Copy:
    """``copy_`` between two buffers, each several times the last-level cache; the destination's pages exist before."""

    def __init__(self, device: torch.device) -> None:
        size = CACHES_PER_BUFFER * last_level_cache(device)
        if device.type == "cuda":
            size = max(size, GPU_BUFFER)
        self.source = torch.ones(size // 4, device=device)
        self.destination = torch.zeros_like(self.source)
        self.work = 2 * self.source.nbytes  # bytes, read and written

    def __call__(self) -> tuple[Tensor, ...]:
        return (self.destination.copy_(self.source),)


def cache_filler(device: torch.device) -> Tensor:
    """Writing this drives everything else out of the caches."""
    return torch.zeros(2 * last_level_cache(device) // 4, device=device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache
def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=UNKNOWN_CACHE)
