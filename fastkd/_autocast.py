"""Computations that autocast must not round."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """There is none to leave on the meta device, where torch raises."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
