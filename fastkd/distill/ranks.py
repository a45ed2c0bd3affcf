"""The processes of a distributed run; one process where there is none."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch import distributed as dist


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, on each of them."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def gathered(value: Any) -> list[Any]:
    """Everyone's, by rank."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return list(values)


def from_first(value: Any) -> Any:
    """What rank 0 has."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def wait() -> None:
    if count() > 1:
        dist.barrier()
