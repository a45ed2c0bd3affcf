"""Checks of a loss on attention scores, for ``bench/gpu_checks.py``: its numbers, and a step that nobody waits in.

The formula is that of ``bench/attention.py``'s kind: all scores in memory, in float64, independent of fastkd.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gate import Wrong

# Heads, the student's and the teacher's heads of keys, tokens, the two sizes of a head. On a GPU several tiles of each.
SIZES = {
    "cuda": ((4, 2, 4, 300, 64, 64), (8, 1, 2, 517, 128, 80), (2, 2, 1, 130, 40, 256)),
    "cpu": ((2, 1, 2, 21, 8, 12),),  # an interpreter takes its time
}
BAR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, in the norm: of rounded gradients
LOSS_BAR = 1e-5
Attention = Callable[..., Tensor]


def _tensors(sizes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    heads, groups, teacher_groups, tokens, dim, teacher_dim = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (groups, dim), (heads, teacher_dim), (teacher_groups, teacher_dim))
    made = [1.5 * torch.randn(2, tokens, n, d, generator=generator) for n, d in shapes]
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def numbers(device: str, dtype: torch.dtype, attention: Attention) -> None:
    """Value and gradients, causal and not, masked and not, of two tensors and of one with itself."""
    for sizes in SIZES[device]:
        for causal, masked, same in product((False, True), repeat=3):
            tensors = _tensors(sizes, device, dtype)
            if same:
                tensors = [tensors[0], tensors[0], tensors[2], tensors[2]]
            options: dict[str, Any] = {"causal": causal}
            if masked:
                mask = torch.arange(sizes[3], device=device) < torch.tensor([[sizes[3] - 5], [3]], device=device)
                options |= {"key_mask": mask, "query_mask": mask.flip(0)}
                for x in tensors[1::2] if not same else ():
                    x.masked_fill_(~mask[:, None, :, None], torch.nan)
            exact = _step(tensors, torch.float64, _formula, same, options)
            got = _step(tensors, dtype, attention, same, options)
            bars = (LOSS_BAR, *[BAR[dtype]] * 2)
            for name, one, want, bar in zip(("loss", "of queries", "of keys"), got, exact, bars, strict=False):
                error = float((one.double() - want).norm() / want.norm())
                if not error <= bar:
                    who = f"{sizes}, causal {causal}, masked {masked}, same {same}"
                    raise Wrong(f"{who}: {name} is off by {error:.1e} of its norm, the bar is {bar:.0e}")


def _step(
    tensors: list[Tensor], dtype: torch.dtype, loss_of: Attention, same: bool, options: dict[str, Any]
) -> list[Tensor]:
    queries, keys, *teacher = (x.detach().to(dtype) for x in tensors)
    leaves = [queries.requires_grad_()] if same else [queries.requires_grad_(), keys.requires_grad_()]
    loss = loss_of(leaves[0], leaves[-1], *teacher, **options, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _formula(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *, causal: bool, reduction: str,
    key_mask: Tensor | None = None, query_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert reduction == "sum"
    heads, tokens = q_s.shape[1:3]
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool, device=q_s.device)
    if causal:
        seen = seen.tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    counts = seen.any(-1) if query_mask is None else seen.any(-1) & query_mask[:, None, :]

    def log_softmax(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.nan_to_num().repeat_interleave(heads // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        return F.log_softmax(scores.masked_fill(~seen, -1e30), -1)

    log_q, log_p = log_softmax(q_s, k_s), log_softmax(q_t, k_t)
    rows = torch.where(seen, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    return torch.where(counts, rows, 0.0).sum()


def step_on(device: str, attention: Attention) -> Callable[[], None]:
    """A step of training to be watched, or captured."""
    queries, keys, *teacher = _tensors(SIZES[device][0], device, torch.bfloat16)
    leaves = queries.requires_grad_(), keys.requires_grad_()
    mask = torch.ones(2, queries.shape[2], dtype=torch.bool, device=device)
    mask[1, 3:] = False

    def step() -> None:
        torch.autograd.grad(attention(*leaves, *teacher, causal=True, key_mask=mask), leaves)

    return step
