"""kd_loss on logits, against eager code, the same code compiled, and Liger.

All get the same logits, to autograd the output of a model (``overwrite_student`` refuses a leaf), in memory that is
reused. Restoring what an overwriting run destroyed and filling the caches with other data come before the clock, for
everyone. ``torch.autograd.grad`` stops at the logits: no accumulation is timed.

The least bytes count logits alone, for a forward and a backward that share but a few numbers a row: forward reads
student and teacher, backward reads both again and writes the gradient. A kernel that does both while a row is in the
cache moves less, and may so exceed 100 % of the copy rate. The least exponentials are those of the same two passes,
see ``bench/exponentials.py``.

``forward`` is what a validation step runs: without gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastkd
from bench import eager, gate
from bench.data import as_output, peaked_pair
from bench.eager import ALPHA, BETA, LIGER_HAS, TEMPERATURE, Loss
from bench.exponentials import least_exponentials
from bench.measure import Case, Contender
from bench.providers import Unavailable, able, compile_now, implementation, need, rows_that_fit
from fastkd import _dispatch
from fastkd._rows import DIVERGENCES

PROVIDERS = ("eager", "compiled", "liger", "fastkd", "fastkd-overwrite")
OURS = ("fastkd", "fastkd-overwrite")
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("forward", "forward+backward")
CPU_ROWS, CPU_ELEMENTS = 512, 2**25
GPU_ROWS = 8192
EAGER_TENSORS = 14  # of the logits' size, that eager code holds at its peak
SAMPLED_ROWS = 16


class Arena:
    """The tensors of one problem, and the logits as a model's output."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pristine, self.teacher, self.target = peaked_pair(rows, vocab, dtype=dtype, device=device)
        self.memory = self.pristine.clone()
        self.rows = rows
        self.restore()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.pristine, self.memory, self.teacher, self.target

    def restore(self) -> None:
        self.memory.copy_(self.pristine)
        self.logits = as_output(self.memory)

    def runner(self, mode: str, loss_of: Loss) -> Callable[[], tuple[Tensor, ...]]:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss_of(self.logits, self.teacher, self.target),)

        def forward_and_backward() -> tuple[Tensor, ...]:
            loss = loss_of(self.logits, self.teacher, self.target)
            # As under a loss scaler: a mean's gradients would underflow in float16.
            (grad,) = torch.autograd.grad(loss, self.logits, torch.full_like(loss, self.rows))
            return loss.detach(), grad

        return forward if mode == "forward" else forward_and_backward


class Gate:
    """What is exact for one arena and divergence: the whole mean, and the gradient of a few rows."""

    def __init__(self, arena: Arena, divergence: str) -> None:
        options = {"divergence": divergence, "temperature": TEMPERATURE, "alpha": ALPHA, "beta": BETA.get(divergence)}
        tensors = arena.pristine, arena.teacher, arena.target
        self.arena = arena
        self.picked = torch.linspace(
            0, arena.rows - 1, min(arena.rows, SAMPLED_ROWS), device=arena.memory.device
        ).long()
        self.sample = gate.expected(*(x[self.picked] for x in tensors), **options)
        self.mean = gate.mean_loss(*tensors, **options)

    def check(self, contender: Contender) -> None:
        contender.prepare()
        loss, *rest = contender.run()
        grad = rest[0][self.picked] if rest else None
        if contender.name not in OURS:
            gate.check_eager(contender.name, loss, grad, self.mean, self.sample, self.arena.memory.dtype)
            return
        gate.check_mean(contender.name, loss, self.mean, self.sample)
        if grad is not None:
            gate.check_gradient(contender.name, grad, self.sample)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab", nargs="+", type=int, default=VOCABULARIES, help="default: those of today's models")
    parser.add_argument("--rows", type=int, help="default: what memory allows")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, bfloat16 on CUDA")
    parser.add_argument("--divergence", nargs="+", default=("forward_kl",), choices=DIVERGENCES, metavar="NAME")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="default: both")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # All sizes before the first allocation: what is free later depends on what ran before.
    rows = {vocab: args.rows or default_rows(vocab, dtype, device) for vocab in args.vocab}
    for vocab in args.vocab:
        arena = Arena(rows[vocab], vocab, dtype, device)
        for divergence in args.divergence:
            truth = Gate(arena, divergence)
            for mode in args.mode:
                yield case(arena, truth, divergence, mode, args)


def case(arena: Arena, truth: Gate, divergence: str, mode: str, args: argparse.Namespace, **kind: object) -> Case:
    """Everyone who can run, checked. ``kind``: further fields of Case."""
    names = [name for name in args.providers if not (name == "fastkd-overwrite" and mode == "forward")]
    contenders, absent = able(names, lambda name: _contender(name, arena, divergence, mode, args.impl), truth.check)
    rows, vocab = arena.memory.shape
    labels = {
        "divergence": divergence,
        "mode": mode,
        "dtype": str(arena.memory.dtype).removeprefix("torch."),
        "rows": rows,
        "vocab": vocab,
    }
    fields = {
        "inputs": arena.inputs,
        "least_bytes": least_bytes(arena, mode),
        "least_exponentials": least_exponentials(divergence, mode, arena.memory.numel()),
        **kind,
    }
    return Case(labels, contenders, absent=absent, **fields)


def least_bytes(arena: Arena, mode: str) -> int:
    reads = arena.memory.nbytes + arena.teacher.nbytes
    return reads if mode == "forward" else 2 * reads + arena.memory.nbytes


def default_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    most = GPU_ROWS if device.type == "cuda" else min(CPU_ROWS, CPU_ELEMENTS // vocab)
    return rows_that_fit(EAGER_TENSORS * dtype.itemsize * vocab, device, most)


def _contender(name: str, arena: Arena, divergence: str, mode: str, impl: str | None) -> Contender:
    if name in OURS:
        ran = implementation("kd_loss", impl, arena.memory, arena.teacher)
        loss = _fastkd(divergence, impl, overwrite=name == "fastkd-overwrite")
    else:
        ran, loss = "", _rival(name, divergence, arena.memory.device)
    contender = Contender(name, arena.runner(mode, loss), arena.restore, ran)
    if name == "compiled":
        compile_now(contender)
    return contender


def _fastkd(divergence: str, impl: str | None, overwrite: bool) -> Loss:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return fastkd.kd_loss(
            student,
            teacher,
            target,
            divergence=divergence,
            temperature=TEMPERATURE,
            alpha=ALPHA,
            beta=BETA.get(divergence),
            overwrite_student=overwrite,
            impl=impl,
        )

    return loss


def _rival(name: str, divergence: str, device: torch.device) -> Loss:
    if name == "eager":
        return eager.eager(divergence)
    if name == "compiled":
        torch._dynamo.reset()  # else the recompilations of a long run count against one limit
        return torch.compile(eager.eager(divergence), dynamic=False)
    if divergence not in LIGER_HAS:
        raise Unavailable(f"it has no {divergence} on logits or probabilities")
    if device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    need("liger_kernel")
    return eager.liger(divergence)
