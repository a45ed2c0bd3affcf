"""How much memory a loss may take for logits that it computes a few rows at a time."""

from __future__ import annotations

import torch

from . import _checks

MIB = 2**20
CPU_BYTES = 128 * MIB
GPU_SHARE, GPU_LEAST, GPU_MOST = 96, 256 * MIB, 2048 * MIB  # a part of the device's memory, within limits

_chosen: int | None = None


def set_workspace(bytes: int | None) -> None:
    """Bytes that a loss may take for the logits of a :class:`fastkd.Head`, of the student and the teachers together.

    More rows at a time mean fewer passes over the weight's gradient and larger matmuls. One row is always computed,
    however small the number. None restores the default: 128 MiB on a CPU, on a GPU a 96th of its memory (1.5 GiB of
    141), but at least 256 MiB and at most 2 GiB.

    Raises:
        TypeError: not an integer.
        ValueError: not positive.

    Example:
        >>> set_workspace(64 * 2**20)
        >>> set_workspace(None)
    """
    global _chosen
    if bytes is not None:
        _checks.count("set_workspace", "bytes", bytes)
    _chosen = bytes


def workspace(device: torch.device) -> int:
    if _chosen is not None:
        return _chosen
    if device.type != "cuda":
        return CPU_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(max(memory // GPU_SHARE, GPU_LEAST), GPU_MOST)
