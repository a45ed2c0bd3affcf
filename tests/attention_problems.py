"""Problems of attention distillation, and what people write for them: in float64 the oracle of the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Sizes and options. ``sharp`` is the spread of a student's scores; at 8 a row has a few keys that count."""

    batch: int = 2
    heads: int = 2
    student_groups: int = 2  # heads of keys
    teacher_groups: int = 2
    queries: int = 21
    keys: int = 21
    dim: int = 8
    teacher_dim: int = 12
    causal: bool = False
    masked: bool = False
    same: bool = False
    scale: float | None = None
    teacher_scale: float | None = None
    sharp: float = 1.0

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Queries and keys of the student, then of the teacher; one tensor for both where they are the same."""
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, tokens: int, dim: int) -> Tensor:
            shape = (self.batch, heads, tokens, dim)
            return (self.sharp**0.5 * torch.randn(shape, generator=generator)).to(dtype)

        student = normal(self.heads, self.queries, self.dim), normal(self.student_groups, self.keys, self.dim)
        teacher = (
            normal(self.heads, self.queries, self.teacher_dim),
            normal(self.teacher_groups, self.keys, self.teacher_dim),
        )
        return (student[0], teacher[0]) if self.same else (*student, *teacher)

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": self.causal, "scale": self.scale, "teacher_scale": self.teacher_scale}
        if self.masked:
            generator = torch.Generator().manual_seed(1)
            options["key_mask"] = torch.rand(self.batch, self.keys, generator=generator) < 0.7
            options["query_mask"] = torch.rand(self.batch, self.queries, generator=generator) < 0.7
            options["key_mask"][0, :3] = False  # under a causal mask these rows see nothing
        return options


PLAIN = Problem()
PROBLEMS = {
    "plain": PLAIN,
    "causal": replace(PLAIN, causal=True),
    "masked": replace(PLAIN, masked=True),
    "causal masked": replace(PLAIN, causal=True, masked=True),
    "grouped": replace(PLAIN, heads=4, teacher_groups=1, batch=1),
    "grouped otherwise": replace(PLAIN, heads=4, student_groups=1, batch=1),
    "few queries": replace(PLAIN, queries=1, keys=37),
    "few keys": replace(PLAIN, queries=37, keys=1),
    "dim 1": replace(PLAIN, dim=1, teacher_dim=1),
    "other scales": replace(PLAIN, scale=1.7, teacher_scale=0.02),
    "sharp": replace(PLAIN, sharp=8.0),
    "itself": replace(PLAIN, same=True),
    "itself, causal masked": replace(PLAIN, same=True, causal=True, masked=True),
}
# Ragged tiles of every kind: C++ has 64 queries and 96 keys in one, compiled Triton up to 128.
LARGE = {
    "large": replace(PLAIN, batch=1, queries=150, keys=205, dim=33, teacher_dim=70),
    "large causal": replace(PLAIN, batch=1, queries=205, keys=205, dim=64, teacher_dim=16, causal=True),
    "large causal masked": replace(PLAIN, queries=205, keys=205, dim=16, causal=True, masked=True, sharp=8.0),
    "large itself": replace(PLAIN, batch=1, queries=205, keys=205, causal=True, same=True, dim=40),
    "wide": replace(PLAIN, batch=1, dim=300, teacher_dim=257),
}


def arrange(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(tensors) == 2:
        student, teacher = tensors
        return student, student, teacher, teacher
    q_s, k_s, q_t, k_t = tensors
    return q_s, k_s, q_t, k_t


def naive(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Every row's loss, and which rows count, with torch's own functions and all scores in memory."""
    heads, queries, keys = q_s.shape[1], q_s.shape[2], k_s.shape[2]
    seen = torch.ones(len(q_s), 1, queries, keys, dtype=torch.bool, device=q_s.device)
    if causal:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool, device=q_s.device).tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    counts = seen.any(-1).expand(-1, heads, -1)
    if query_mask is not None:
        counts = counts & query_mask[:, None, :]

    def log_softmax(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        scores = q @ k.repeat_interleave(heads // k.shape[1], 1).mT
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        return F.log_softmax(scores.masked_fill(~seen & counts.unsqueeze(-1), -1e30), -1)

    log_q, log_p = log_softmax(q_s, k_s, scale), log_softmax(q_t, k_t, teacher_scale)
    losses = torch.where(seen, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    return torch.where(counts, losses, 0.0), counts


def upstream_of(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A gradient for each row, of both signs."""
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1.5, max(1, count), dtype=like.dtype, device=like.device)[:count].reshape(shape)


def expected(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Losses and gradients of the student, each with rows of what is judged together."""
    leaves = [x.detach().requires_grad_() for x in arrange(tensors)]
    if len(tensors) == 2:
        leaves[1] = leaves[0]
    losses, _ = naive(*leaves, **options)
    wanted = leaves[: len(tensors) // 2]
    gradients = torch.autograd.grad(losses, wanted, upstream_of(tuple(losses.shape), losses))
    return losses.detach().reshape(-1), *(x.flatten(0, -2) for x in gradients)


def computed(impl: str, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The same of an implementation."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    tensors = tuple(x.detach().to(device) for x in tensors)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    wanted = [x.requires_grad_() for x in tensors[: len(tensors) // 2]]
    losses = fastkd.attention_kl_loss(*arrange(tensors), **options, reduction="none", impl=impl)
    gradients = torch.autograd.grad(losses, wanted, upstream_of(tuple(losses.shape), losses))
    return losses.detach().reshape(-1).cpu(), *(x.flatten(0, -2).cpu() for x in gradients)
