"""The distillation loss of two heads as people write it today, and with what torch and Liger have for it.

All take hidden states and weights; ``soft_only`` leaves the hard term out. What a rival needs beside its kernel (the
teacher's probabilities, another matmul for the hard term) is part of its price.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import eager as logits
from bench.eager import ALPHA, BETA, TEMPERATURE

# Student's hidden states and weight, the teacher's, target.
HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

LINEAR_CROSS_ENTROPY_HAS = ("forward_kl", "cross_entropy")
LIGER_BETA = {"forward_kl": 0.0, "jsd": BETA["jsd"], "reverse_kl": 1.0}  # its ends are the two KL divergences
LIGER_CHUNKED_HAS = ("jsd",)


def eager(divergence: str, soft_only: bool) -> HeadLoss:
    both, soft = logits.eager(divergence), logits.soft_loss(divergence)

    def loss(input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        student = F.linear(input, weight)
        with torch.no_grad():
            teacher = F.linear(teacher_input, teacher_weight)
        return soft(student, teacher) if soft_only else both(student, teacher, target)

    return loss


def linear_cross_entropy(soft_only: bool) -> HeadLoss:
    """torch's fused cross-entropy of one head.

    With the teacher's probabilities for a target it is forward_kl plus the teacher's entropy, with the same gradient.
    torch 2.13 does not chunk that: its chunks take target ids alone, and ``options`` are ignored with a warning, so
    that logits and probabilities both exist. The hard term is a call of its own, in chunks, since the temperatures
    differ.
    """

    def loss(input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities = F.softmax(F.linear(teacher_input, teacher_weight) / TEMPERATURE, -1)
        soft = TEMPERATURE**2 * F.linear_cross_entropy(input / TEMPERATURE, weight, probabilities)
        if soft_only:
            return soft
        hard = F.linear_cross_entropy(input, weight, target, options=torch.nn.LinearCrossEntropyOptions())
        return ALPHA * hard + (1 - ALPHA) * soft

    return loss


def liger_fused(divergence: str, soft_only: bool) -> HeadLoss:
    """Its fused-linear JSD has no hard term, so that is its fused-linear cross-entropy, with matmuls of its own."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    soft_of = LigerFusedLinearJSD(jsd_beta=LIGER_BETA[divergence], temperature=TEMPERATURE)
    hard_of = LigerFusedLinearCrossEntropyLoss()

    def loss(input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        soft = TEMPERATURE**2 * soft_of(input, weight, teacher_input, teacher_weight, None)
        return soft if soft_only else ALPHA * hard_of(weight, input, target) + (1 - ALPHA) * soft

    return loss


def liger_chunked(divergence: str, soft_only: bool) -> HeadLoss:
    """Its distillation JSD in chunks of 1024 tokens, which torch.compile makes; hard term included."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    both = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0 if soft_only else ALPHA,
        weight_soft_loss=TEMPERATURE**2 * (1.0 if soft_only else 1 - ALPHA),
        beta=BETA[divergence],
        temperature=TEMPERATURE,
    )

    def loss(input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        result = both(input, weight, teacher_input, teacher_weight, target, None, None)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return loss
