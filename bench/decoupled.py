"""dkd_loss, nkd_loss, standardised kd_loss and dist_loss, against the published code and the same compiled.

The problem and the clock are those of ``bench/kd.py``. The published code is the authors', with means over rows; at
these logits it is still finite. The least bytes are those of two passes over all logits and one gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench import gate
from bench.gate import Expected
from bench.kd import DTYPES, MODES, Arena, default_rows, least_bytes
from bench.measure import Case, Contender
from bench.providers import able, compile_now, implementation
from fastkd import _dispatch
from fastkd.testing import exact_and_error

PROVIDERS = ("eager", "compiled", "fastkd")
VOCABULARIES = (1000, 32000)
MASK = -1000.0  # as the authors of dkd leave the target out
SAMPLED_ROWS = 16

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    is_target = F.one_hot(target, student.shape[1])
    q, p = F.softmax(student / 4, 1), F.softmax(teacher / 4, 1)
    both = [torch.stack([(x * is_target).sum(1), (x * (1 - is_target)).sum(1)], 1) for x in (q, p)]
    tckd = F.kl_div(both[0].log(), both[1], reduction="batchmean")
    others = [x / 4 + MASK * is_target for x in (student, teacher)]
    nckd = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="batchmean")
    return 16 * (tckd + 8 * nckd)


def _nkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student, 1), F.softmax(teacher, 1)
    label = target.unsqueeze(1)
    of_target = -(p.gather(1, label) * log_q.gather(1, label)).mean()
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, label, False)
    s, t = (x[others].view(len(x), -1) for x in (student, teacher))
    return of_target - 1.5 * (F.softmax(t, 1) * F.log_softmax(s, 1)).sum(1).mean()


def _standardize(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    s, t = ((x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) / 2 for x in (student, teacher))
    return 4 * F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")


def _dist(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    q, p = F.softmax(student / 4, 1), F.softmax(teacher / 4, 1)

    def pearson(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()

    return 16 * (2 - pearson(q, p) - pearson(q.T, p.T))


# name -> operation, the published code, and fastkd's
LOSSES: dict[str, tuple[str, Loss, Callable[..., Tensor]]] = {
    "dkd": ("dkd_loss", _dkd, fastkd.dkd_loss),
    "nkd": ("nkd_loss", _nkd, fastkd.nkd_loss),
    "standardize": (
        "kd_loss",
        _standardize,
        lambda s, t, y, **options: fastkd.kd_loss(s, t, standardize=True, temperature=2.0, **options),
    ),
    "dist": ("dist_loss", _dist, lambda s, t, y, **options: fastkd.dist_loss(s, t, temperature=4.0, **options)),
}


class Gate:
    """What is exact: the loss of all rows, and the gradient of some, or of all where one row depends on the others."""

    def __init__(self, arena: Arena, loss: str) -> None:
        self.arena, self.ours = arena, LOSSES[loss][2]
        rows = len(arena.memory)
        self.whole = loss == "dist"
        wanted = torch.linspace(0, rows - 1, rows if self.whole else min(rows, SAMPLED_ROWS))
        self.picked = wanted.long().to(arena.memory.device)
        self.sample = self._expected()
        tensors = [x.split(rows if self.whole else 64) for x in (arena.pristine, arena.teacher, arena.target)]
        parts = [
            self.ours(s.double(), t.double(), y, impl="reference") * len(s) for s, t, y in zip(*tensors, strict=True)
        ]
        self.mean = torch.stack(parts).sum() / rows

    def check(self, contender: Contender) -> None:
        contender.prepare()
        loss, *rest = contender.run()
        grad = rest[0][self.picked] if rest else None
        if contender.name != "fastkd":
            gate.check_eager(contender.name, loss, grad, self.mean, self.sample, self.arena.memory.dtype)
            return
        gate.check_mean(contender.name, loss, self.mean, self.sample)
        if grad is not None:
            gate.check_gradient(contender.name, grad, self.sample)

    def _expected(self) -> Expected:
        """Of the picked rows, each with an upstream gradient of 1."""
        target = self.arena.target[self.picked]

        def reference(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
            leaf = student.detach().requires_grad_()
            loss = self.ours(leaf, teacher, target, impl="reference")
            (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, len(leaf)))
            return loss.detach().reshape(1), grad

        tensors = self.arena.pristine[self.picked], self.arena.teacher[self.picked]
        (loss, grad), (loss_error, grad_error) = exact_and_error(reference, *tensors)
        return Expected(loss, loss_error, grad, grad_error.unsqueeze(-1), torch.zeros_like(loss_error[:1]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab", nargs="+", type=int, default=VOCABULARIES, help="default: 1000 32000")
    parser.add_argument("--rows", type=int, help="default: what memory allows")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, bfloat16 on CUDA")
    parser.add_argument("--loss", nargs="+", default=tuple(LOSSES), choices=tuple(LOSSES), metavar="NAME")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="default: both")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # All sizes before the first allocation: what is free later depends on what ran before.
    rows = {vocab: args.rows or default_rows(vocab, dtype, device) for vocab in args.vocab}
    for vocab in args.vocab:
        arena = Arena(rows[vocab], vocab, dtype, device)
        for loss in args.loss:
            truth = Gate(arena, loss)
            for mode in args.mode:
                yield case(arena, truth, loss, mode, args)


def case(arena: Arena, truth: Gate, loss: str, mode: str, args: argparse.Namespace) -> Case:
    """Everyone who can run, checked."""
    contenders, absent = able(args.providers, lambda name: _contender(name, arena, loss, mode, args.impl), truth.check)
    rows, vocab = arena.memory.shape
    labels = {"loss": loss, "mode": mode, "dtype": str(arena.memory.dtype).removeprefix("torch.")}
    return Case(
        {**labels, "rows": rows, "vocab": vocab},
        contenders,
        inputs=arena.inputs,
        absent=absent,
        least_bytes=least_bytes(arena, mode),
    )


def _contender(name: str, arena: Arena, loss: str, mode: str, impl: str | None) -> Contender:
    op, published, ours = LOSSES[loss]
    ran, run = "", published
    if name == "fastkd":
        ran = implementation(op, impl, arena.memory, arena.teacher)
        run = lambda student, teacher, target: ours(student, teacher, target, impl=impl)  # noqa: E731
    elif name == "compiled":
        torch._dynamo.reset()  # else the recompilations of a long run count against one limit
        run = torch.compile(published, dynamic=False)
    contender = Contender(name, arena.runner(mode, run), arena.restore, ran)
    if name == "compiled":
        compile_now(contender)
    return contender
