"""The most memory a run holds at one time, beside what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import Contender

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"


class Peak(NamedTuple):
    beside_inputs: int  # bytes
    beside_results: int  # bytes, the results that do not live in an input's memory taken off too


def peak(contender: Contender, device: torch.device, inputs: Iterable[Tensor]) -> Peak | None:
    """None where the platform cannot tell (a CPU without Linux's /proc)."""
    contender.prepare()
    gc.collect()
    measured = _on_gpu(contender.run, device) if device.type == "cuda" else _on_cpu(contender.run)
    if measured is None:
        return None
    total, results = measured
    owned = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    for tensor in inputs:
        owned.pop(tensor.untyped_storage().data_ptr(), None)
    return Peak(total, max(0, total - sum(owned.values())))


def _on_gpu(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[int, tuple[Tensor, ...]]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, results


def _on_cpu(run: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]] | None:
    """The high-water mark of resident memory: it sees the scratch of native code too, as torch's profiler does not."""
    try:
        # Freed memory that malloc kept is resident already, and would hide what the run takes.
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text(RESET_HIGH_WATER)
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    results = run()
    return max(0, _status("VmHWM") - before), results


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")
