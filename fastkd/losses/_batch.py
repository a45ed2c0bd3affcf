"""A batch that lies on several ranks: a loss on the relations of its samples needs the pairs across them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .._features import Features

if TYPE_CHECKING:
    Group = dist.ProcessGroup | None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_group(op: str, group: Any) -> None:
    """Also on a rank that is not in the group, where torch hands out something else."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        _checks.bad_type(op, "group", "be a torch.distributed process group that this rank is in", type(group).__name__)


def by_name(name: str | None) -> Group:
    """A process group is no argument of an operator, its name is."""
    if name is None:
        return None
    from torch._C._distributed_c10d import _resolve_process_group  # builds without torch.distributed lack it

    return _resolve_process_group(name)  # type: ignore[arg-type]  # it wants a string of its own kind


def gather(op: str, student: Tensor, teacher: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Features, int]:
    """Student and teacher of all ranks, in rank order, and the first row that is this rank's.

    Ranks may have any number of rows. The numbers are needed before rows can be sent: the host waits for the device.
    """
    counts = _counts(op, student, teacher, group)
    first = sum(counts[: dist.get_rank(group)])
    return _gather(student, counts, group), Features(_gather(teacher, counts, group)), first


def _counts(op: str, student: Tensor, teacher: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Rows of each rank. All ranks see the same numbers, so that a wrong one raises on all of them."""
    kinds = [number for x in (student, teacher) for number in (x.shape[1], FLOATS.index(x.dtype))]
    mine = torch.tensor([student.shape[0], *kinds], device=student.device)
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_ranks, mine, group=group)
    table: list[list[int]] = torch.stack(all_ranks).tolist()
    for name, column in (("student", 1), ("teacher", 3)):
        _same(op, name, "length", [row[column] for row in table])
        _same(op, name, "dtype", [FLOATS[row[column + 1]] for row in table])
    return [row[0] for row in table]


def _same(op: str, name: str, what: str, values: list[Any]) -> None:
    if len(set(values)) > 1:
        _checks.bad_value(op, name, f"have rows of the same {what} on every rank", values)


def _gather(rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    most = max(counts)
    mine = rows.detach().contiguous()
    if len(mine) < most:  # not every backend sends tensors of different sizes
        mine = torch.cat([mine, mine.new_zeros(most - len(mine), mine.shape[1])])
    if mine.numel() == 0:
        return rows.new_empty(sum(counts), rows.shape[1])
    all_ranks = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(all_ranks, mine, group=group)
    return torch.cat([part[:count] for part, count in zip(all_ranks, counts, strict=True)])
