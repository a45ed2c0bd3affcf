"""What is exact for the loss of two heads: no head is timed whose numbers have not passed here.

The loss is checked as a whole, the gradients in some rows of the hidden states and some of the weight (which are sums
over all tokens), against float64 from the same operands. fastkd is held to 256 times the error that eager code makes
in float32 there, element by element. Where it rounds the gradient of the logits to 16 bits, once, before the two
matmuls, what that can change at most is allowed on top. Others are only kept from computing something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from bench.data import Heads
from bench.gate import EAGER_BAR, SLACK, Wrong, within

SAMPLED_ROWS = 16
SAMPLED_IDS = 64
SLICE = 2**23  # logits at a time


class Numbers(NamedTuple):
    """Of the sum over all rows, so that no row's gradient depends on how many there are."""

    losses: Tensor  # (rows,)
    of_input: Tensor  # (sampled rows, hidden)
    of_weight: Tensor  # (sampled ids, hidden)
    # What rounding the gradient of the logits can change at most.
    input_rounding: Tensor
    weight_rounding: Tensor


class Gate:
    """``options`` are those of kd_loss, with a target only if there is a hard term."""

    def __init__(self, heads: Heads, soft_only: bool, **options: Any) -> None:
        self.heads, self.target = heads, None if soft_only else heads.target
        rows, vocab = len(heads.input), len(heads.weight)
        device = heads.input.device
        self.rows = torch.linspace(0, rows - 1, min(rows, SAMPLED_ROWS), device=device).long()
        # Any ids, and as many that are someone's label: only there a gradient of the hard term is large.
        anywhere = torch.linspace(0, vocab - 1, min(vocab, SAMPLED_IDS // 2), device=device).long()
        self.ids = torch.cat([anywhere, heads.target[: SAMPLED_IDS // 2]]).unique()
        self.exact = self._numbers(torch.float64, options)
        single = self._numbers(torch.float32, options)
        self.loss_error = (single.losses - self.exact.losses).abs().max()
        self.input_error, self.weight_error = (
            (a - b).abs().amax(-1, keepdim=True) for a, b in zip(single[1:3], self.exact[1:3], strict=True)
        )
        if not (self.exact.of_input.abs().max() > 0 and self.exact.of_weight.abs().max() > 0):
            raise Wrong("the expected gradients are 0 everywhere, so this check sees nothing")

    def check(self, who: str, loss: Tensor, gradients: Sequence[Tensor], upstream: float, rounded: bool) -> None:
        """Of fastkd: the mean, and the gradients of ``upstream`` times it. ``rounded``: on their way, to 16 bits."""
        mean = self.exact.losses.mean()
        bar = torch.finfo(torch.float32).eps * mean.abs() + SLACK * self.loss_error
        within(f"{who}: loss", loss.double(), mean, bar)
        roundings = self.exact.input_rounding, self.exact.weight_rounding
        errors = zip(self._sampled(gradients, upstream), (self.input_error, self.weight_error), roundings, strict=False)
        for (name, got, want), error, rounding in errors:
            finfo = torch.finfo(self.heads.input.dtype)
            bar = finfo.eps * want.abs() + finfo.tiny + SLACK * error + (rounding if rounded else 0)
            within(f"{who}: {name}", got, want, bar)

    def check_rival(self, who: str, loss: Tensor | None, gradients: Sequence[Tensor], upstream: float) -> None:
        """``loss``: None if it is another number, with the same gradient."""
        mean, bar = self.exact.losses.mean(), EAGER_BAR[self.heads.input.dtype]
        if loss is not None:
            within(f"{who}: loss", loss.double(), mean, bar * mean.abs())
        for name, got, want in self._sampled(gradients, upstream):
            error = float((got - want).norm() / want.norm())
            if not error <= bar:
                raise Wrong(f"{who}: {name} is off by {error:.1e} of its norm, the bar is {bar:.0e}")

    def _sampled(self, gradients: Sequence[Tensor], upstream: float) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, what was got and what is exact; of the input and, if it is there, of the weight."""
        factor = len(self.heads.input) / upstream
        names, picked = ("input gradient", "weight gradient"), (self.rows, self.ids)
        for name, gradient, rows, want in zip(names, gradients, picked, self.exact[1:3], strict=False):
            yield name, gradient[rows].double() * factor, want

    def _numbers(self, dtype: torch.dtype, options: dict[str, Any]) -> Numbers:
        heads = self.heads
        weight, teacher_weight = (x.detach().to(dtype) for x in (heads.weight, heads.teacher_weight))
        losses = heads.input.new_empty(len(heads.input), dtype=torch.float64)
        of_weight = torch.zeros((len(self.ids), weight.shape[1]), dtype=torch.float64, device=losses.device)
        weight_rounding = torch.zeros_like(of_weight)
        picked: list[Tensor] = []
        for rows in torch.arange(len(losses), device=losses.device).split(max(1, SLICE // len(weight))):
            states = heads.input.detach()[rows].to(dtype)
            logits = (states @ weight.t()).requires_grad_()
            teacher = heads.teacher_input[rows].to(dtype) @ teacher_weight.t()
            target = None if self.target is None else self.target[rows]
            loss = fastkd.kd_loss(logits, teacher, target, **options, reduction="none", impl="reference")
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            losses[rows] = loss.detach().double()
            columns = gradient[:, self.ids].t()
            of_weight += columns @ states
            weight_rounding += self._rounding(columns) @ states.abs()
            picked.append(gradient[torch.isin(rows, self.rows)])
        gradient = torch.cat(picked)
        of_input, input_rounding = gradient @ weight, self._rounding(gradient) @ weight.abs()
        return Numbers(losses, of_input.double(), of_weight, input_rounding.double(), weight_rounding)

    def _rounding(self, gradient: Tensor) -> Tensor:
        finfo = torch.finfo(self.heads.input.dtype)
        return gradient.abs() * finfo.eps + finfo.smallest_normal * finfo.eps
