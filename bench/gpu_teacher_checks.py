"""Checks of teachers without logits, for ``bench/gpu_checks.py``: loss and gradient against the reference.

The reference computes the same in float64, of the same numbers, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from bench.data import peaked_pair
from bench.gate import Wrong
from fastkd import Expected, Head, TopK

SIZES = {"cuda": (300, 5003), "cpu": (3, 257)}  # rows and vocabulary; an interpreter of kernels takes its time
K, HIDDEN, IGNORED = 32, 48, -100
TEMPERATURE, ALPHA = 2.0, 0.3
TAILS = {"bucket": "reverse_kl", "uniform": "jsd", "renormalize": "forward_kl", "support": "forward_kl"}
BAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative, in the norm
WIDE = torch.float64
KD = Callable[..., Tensor]


class Given(NamedTuple):
    """What storage holds, to be laid out for a device and a dtype."""

    logits: Tensor
    taught: Tensor
    target: Tensor
    hidden: Tensor
    weight: Tensor
    mapping: Tensor

    def to(self, device: str, dtype: torch.dtype) -> Given:
        return Given(*(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in self))


def numbers(device: str, dtype: torch.dtype, kd: KD) -> None:
    """Every tail, a teacher known by one vector a row, vocabularies that are mapped, and teachers of two kinds."""
    given = _given(device, dtype)
    wrong = []
    for name, arguments in _problems(given).items():
        exact = _step(arguments, given.to("cpu", WIDE), partial(fastkd.kd_loss, impl="reference"))
        for what, got, want in zip(("loss", "gradient"), _step(arguments, given, kd), exact, strict=True):
            error = float((got.cpu().to(WIDE) - want).norm() / want.norm())
            if not error <= BAR[dtype]:
                wrong.append(f"{name}: the {what} is off by {error:.1e} of its norm, the bar is {BAR[dtype]:.0e}")
    if wrong:
        raise Wrong("; ".join(wrong))


def _given(device: str, dtype: torch.dtype) -> Given:
    rows, vocab = SIZES[device]
    logits, taught, target = peaked_pair(rows, vocab, dtype=dtype, device=device)
    target[1] = IGNORED
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).to(device, dtype) for n in (rows, vocab))
    mapping = torch.randperm(vocab, generator=generator)
    mapping[::5] = -1
    return Given(logits, taught, target, hidden, weight, mapping.to(device))


Arguments = Callable[[Given], tuple[Tensor, Any, Any, dict[str, Any]]]  # leaf, student, teacher, options


def _problems(given: Given) -> dict[str, Arguments]:
    known = TopK.from_logits(given.taught, K, temperature=TEMPERATURE)

    def top(tail: str, like: Given) -> TopK:
        ids, log_probs = (x.to(like.logits.device) for x in (known.indices, known.log_probs))
        return TopK(ids, log_probs, tail=tail, temperature=TEMPERATURE)

    def tailed(tail: str, divergence: str) -> Arguments:
        return lambda x: (x.logits, x.logits, top(tail, x), {"divergence": divergence})

    def expected(x: Given) -> tuple[Tensor, Any, Any, dict[str, Any]]:
        teacher = Expected.from_teacher(x.taught, x.weight, temperature=TEMPERATURE)
        return x.hidden, Head(x.hidden, x.weight), teacher, {}

    return {
        **{f"tail {tail}, {divergence}": tailed(tail, divergence) for tail, divergence in TAILS.items()},
        "expected": expected,
        "mapped": lambda x: (x.logits, x.logits, x.taught, {"vocab_map": x.mapping}),
        "two kinds": lambda x: (x.logits, x.logits, [x.taught, top("bucket", x)], {}),
    }


def _step(arguments: Arguments, given: Given, kd: KD) -> tuple[Tensor, Tensor]:
    given.logits.requires_grad_(), given.hidden.requires_grad_()
    leaf, student, teacher, options = arguments(given)
    loss = kd(student, teacher, given.target, temperature=TEMPERATURE, alpha=ALPHA, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad
