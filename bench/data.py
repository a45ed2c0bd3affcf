"""Logits like those of language models: a long tail and a few peaks, most of them shared by student and teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Heads(NamedTuple):
    """What two heads compute their logits from, and the target."""

    input: Tensor  # (rows, hidden)
    weight: Tensor  # (vocab, hidden)
    teacher_input: Tensor
    teacher_weight: Tensor
    target: Tensor


def peaked_heads(
    rows: int,
    vocab: int,
    hidden: int,
    teacher_hidden: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Heads:
    """Hidden states and matrices whose logits are like those of :func:`peaked_pair`.

    The rows of a matrix have a length of about 1, so that adding one, times a height, to a hidden state makes a peak.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    def ids(count: int) -> Tensor:
        return torch.randint(vocab, (rows, count), device=device, generator=generator)

    heights = torch.rand(rows, PEAKS, 1, device=device, generator=generator).mul_(HEIGHT).to(dtype)

    def head(size: int, peaks: Tensor) -> tuple[Tensor, Tensor]:
        weight = normal(vocab, size).mul_(size**-0.5)
        return normal(rows, size).mul_(2).add_((heights * weight[peaks]).sum(1)), weight

    peaks = ids(PEAKS)
    teacher = head(teacher_hidden, peaks)
    peaks = torch.cat([ids(1), peaks[:, 1:]], -1)
    student = head(hidden, peaks)
    known = torch.arange(rows, device=device) % 2 == 0
    return Heads(*student, *teacher, torch.where(known, peaks[:, -1], ids(1)[:, 0]))
