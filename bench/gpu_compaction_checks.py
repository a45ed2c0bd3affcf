"""Checks of ``Head(compact="device")`` for ``bench/gpu_checks.py``: its numbers, and a step that nobody waits in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.data import Heads, peaked_heads
from bench.gate import Wrong
from fastkd import Head

# Rows, vocabulary, hidden sizes. On a GPU tiles of 128 x 256 for the weight and of 128 x 128 for the input.
SIZES = {"cuda": (1100, 20011, 512, 768), "cpu": (6, 37, 16, 24)}
IGNORED = -100
BAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative, in the norm
KD = Callable[..., Tensor]


def _heads(device: str, dtype: torch.dtype, counting: int) -> Heads:
    """So many rows count, here and there; the others hold NaN."""
    heads = peaked_heads(*SIZES[device], dtype=dtype, device=device)
    dropped = torch.randperm(len(heads.target), generator=torch.Generator().manual_seed(0))[counting:].to(device)
    heads.target[dropped] = IGNORED
    heads.input[dropped] = torch.nan
    heads.teacher_input[dropped] = torch.nan
    return heads


def numbers(device: str, dtype: torch.dtype, kd: KD) -> None:
    """Value and gradients in several chunks, for all rows, some, one and none that count, against float64."""
    rows, vocab = SIZES[device][:2]
    few = 2 * 4 * vocab * (rows // 2)  # bytes for two or three chunks
    for counting, precision in product((rows, rows // 2 + 1, 1, 0), (None, "float32")):
        heads = _heads(device, dtype, counting)
        exact = _step(heads, torch.float64, _reference)
        got = _step(heads, dtype, kd, compact="device", grad_precision=precision, workspace=few)
        who = f"{counting} of {rows} rows, precision {precision}"
        for name, one, want in zip(("loss", "of the input", "of the weight"), got, exact, strict=True):
            error = float((one.double() - want).norm())
            if not error <= BAR[dtype] * float(want.norm()):
                raise Wrong(f"{who}: {name} is off by {error:.1e}, of a norm of {float(want.norm()):.1e}")
        if bool(got[1][heads.target == IGNORED].any()):
            raise Wrong(f"{who}: the gradient of a dropped row must be 0")


def _step(heads: Heads, dtype: torch.dtype, loss_of: KD, **options: Any) -> list[Tensor]:
    tensors = [heads.input, heads.weight, heads.teacher_input, heads.teacher_weight]
    if loss_of is _reference:  # plain matmuls multiply every row
        tensors = [x.nan_to_num() for x in tensors]
    tensors = [x.to(dtype, copy=True) for x in tensors]
    leaves, teacher = [x.requires_grad_() for x in tensors[:2]], Head(*tensors[2:])
    loss = loss_of(Head(*leaves, scale=0.75, **options), teacher, heads.target, temperature=2.0, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _reference(student: Head, teacher: Head, target: Tensor, **options: Any) -> Tensor:
    return fastkd.kd_loss(student.logits(), teacher.logits(), target, impl="reference", **options)


def step_on(device: str, kd: KD) -> Callable[[], None]:
    """A step of training to be watched, or captured."""
    heads = _heads(device, torch.bfloat16, SIZES[device][0] // 2)
    leaves = heads.input.requires_grad_(), heads.weight.requires_grad_()
    teacher = Head(heads.teacher_input, heads.teacher_weight)

    def step() -> None:
        loss = kd(Head(*leaves, compact="device"), teacher, heads.target)
        torch.autograd.grad(loss, leaves)

    return step
