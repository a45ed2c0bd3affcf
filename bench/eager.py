"""The distillation losses as people write them in PyTorch, and with Liger's kernels: what fastkd is timed against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 2.0
ALPHA = 0.5
BETA = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher, target


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p | q), the mean over rows."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _log_mixture(beta: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.logaddexp(log_a + math.log(beta), log_b + math.log1p(-beta))


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_p, log_q)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_q, log_p)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    beta = BETA["jsd"]
    log_m = _log_mixture(beta, log_p, log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _skew_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_p, _log_mixture(BETA["skew_kl"], log_p, log_q))


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_q, _log_mixture(BETA["skew_reverse_kl"], log_q, log_p))


def _cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -(log_p.exp() * log_q).sum(-1).mean()


ON_LOG_PROBABILITIES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "cross_entropy": _cross_entropy,
}


def soft_loss(divergence: str) -> Callable[[Tensor, Tensor], Tensor]:
    """T^2 times the divergence, of student and teacher."""
    if divergence == "mse":
        return lambda student, teacher: F.mse_loss(student, teacher)

    def tvd(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = F.softmax(teacher / TEMPERATURE, -1), F.softmax(student / TEMPERATURE, -1)
        return TEMPERATURE**2 * 0.5 * (p - q).abs().sum(-1).mean()

    if divergence == "tvd":
        return tvd
    compare = ON_LOG_PROBABILITIES[divergence]

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(teacher / TEMPERATURE, -1), F.log_softmax(student / TEMPERATURE, -1)
        return TEMPERATURE**2 * compare(log_p, log_q)

    return soft


def eager(divergence: str) -> Loss:
    soft = soft_loss(divergence)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return ALPHA * F.cross_entropy(student, target) + (1 - ALPHA) * soft(student, teacher)

    return loss


def liger(divergence: str) -> Loss:
    """Liger's kernels take (log-)probabilities, so the softmaxes that they need are part of the price.

    The hard term is torch's: Liger's cross-entropy writes its gradient over the logits, which the soft term reads too.
    """
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss, LigerTVDLoss

    kl, total_variation = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerTVDLoss(reduction="batchmean")
    jensen_shannon = LigerJSD(beta=BETA["jsd"])

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student / TEMPERATURE, teacher / TEMPERATURE
        if divergence == "tvd":
            return total_variation(F.softmax(student, -1), F.softmax(teacher, -1))
        log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        return {"forward_kl": kl, "jsd": jensen_shannon}[divergence](log_q, log_p)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        hard = F.cross_entropy(student, target)
        return ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft(student, teacher)

    return loss


LIGER_HAS = ("forward_kl", "jsd", "tvd")
