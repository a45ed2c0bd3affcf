"""Logits like those of language models: a long tail and a few peaks, most of them shared by student and teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PEAKS = 3
HEIGHT = 30.0  # of the highest; others are lower, so that some rows are flat and some are all but certain


def peaked_pair(
    rows: int, vocab: int, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits ``(rows, vocab)`` and target ids ``(rows,)``, half of which are a teacher's peak."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, vocab, dtype=dtype, device=device, generator=generator)

    def ids(count: int) -> Tensor:
        return torch.randint(vocab, (rows, count), device=device, generator=generator)

    teacher = normal().mul_(2)
    student = normal().add_(teacher, alpha=0.7)
    peaks, heights = ids(PEAKS), torch.rand(rows, PEAKS, device=device, generator=generator).mul_(HEIGHT).to(dtype)
    teacher.scatter_add_(-1, peaks, heights)
    peaks = torch.cat([ids(1), peaks[:, 1:]], -1)
    student.scatter_add_(-1, peaks, heights)
    known = torch.arange(rows, device=device) % 2 == 0
    return student, teacher, torch.where(known, peaks[:, -1], ids(1)[:, 0])


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def as_output(memory: Tensor) -> Tensor:
    """Logits as a model hands them out, in memory that is there already: neither a leaf nor a view of one."""
    output: Tensor = _Output.apply(torch.zeros((), device=memory.device, requires_grad=True), memory)
    return output
