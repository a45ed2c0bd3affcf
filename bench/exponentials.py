"""The other roof: how many exponentials a loss cannot do without, and how many this machine computes in a second.

Counted are exponentials and logarithms alike: a GPU computes both in the same unit at the same rate, and a CPU by
polynomials of about the same length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CPU_ELEMENTS = 2**17  # for each thread; with the results a MiB, which stays in its caches
CPU_REPEATS = 64
GPU_ELEMENTS = 2**22  # 8 for each of the 2048 threads that a multiprocessor holds, on 256 of them
GPU_CHAIN = 512  # exponentials for each value written: writing them takes 1 % of the time


class Need(NamedTuple):
    """Exponentials and logarithms for one id of student and teacher, in each walk over a row.

    Between forward and backward only a few numbers a row are kept, so that backward computes p and q again. The
    normalisers come first; what depends on both of them takes a second walk. The hard term has none of its own: at
    ``bench.eager.TEMPERATURE`` its exponentials are the squares of the student's.
    """

    normalisers: int
    value: int
    gradient: int


NEEDED = {
    "forward_kl": Need(2, 0, 2),  # p and q; the value is a running sum beside the normalisers
    "cross_entropy": Need(2, 0, 2),
    "reverse_kl": Need(2, 1, 1),  # q alone: p is there as a logit
    "tvd": Need(2, 2, 2),
    "jsd": Need(2, 3, 3),  # p, q and one logarithm, from which log(p / m) and log(q / m) both follow
    "skew_kl": Need(2, 3, 2),  # the slope is rest (1 - p / m), without a logarithm
    "skew_reverse_kl": Need(2, 3, 3),
    "mse": Need(1, 0, 1),  # the hard term's: it has no softmax of its own
}


def least_exponentials(divergence: str, mode: str, pairs: int) -> int:
    """Of ``pairs`` ids of student and teacher."""
    need = NEEDED[divergence]
    forward = need.normalisers + need.value
    return pairs * (forward if mode == "forward" else forward + need.gradient)


class Exponentials:
    """As many exponentials at a time as keep the device busy, with next to no memory moved."""

    def __init__(self, device: torch.device) -> None:
        self.run, self.work = _on_gpu(device) if device.type == "cuda" else _on_cpu(torch.get_num_threads())

    def __call__(self) -> tuple[Tensor, ...]:
        return (self.run(),)


def _on_cpu(threads: int) -> tuple[Callable[[], Tensor], int]:
    """``exp2`` and not ``exp``: torch computes the latter more exactly, at a quarter of the rate with AVX-512."""
    exponents = torch.linspace(-20, 0, threads * CPU_ELEMENTS)
    results = torch.zeros_like(exponents)

    def run() -> Tensor:
        for _ in range(CPU_REPEATS):
            torch.exp2(exponents, out=results)
        return results

    return run, CPU_REPEATS * exponents.numel()


def _on_gpu(device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """``exp2`` of ``exp2`` of ..., in registers: a call of ``torch.exp2`` would take the time of its memory."""
    from bench.exponential_chains import exponential_chains  # Triton, which the CPU does without

    results = torch.zeros(GPU_ELEMENTS, device=device)
    return lambda: exponential_chains(results, GPU_CHAIN), GPU_CHAIN * GPU_ELEMENTS
