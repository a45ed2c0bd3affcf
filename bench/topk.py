"""kd_loss against a teacher of k ids a row, as caches hand them out, beside plain cross-entropy.

The teacher's best k ids and their log-probabilities are there before the clock starts; all other ids are one more event
("bucket"). Eager code gathers them from a log_softmax of the whole row. fastkd's plain cross-entropy of the same logits
shows what the soft term adds: it needs no further pass over them. The least bytes and exponentials are those of
cross-entropy too: the student's logits are read twice, and one gradient is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench import gate
from bench.eager import ALPHA, BETA, ON_LOG_PROBABILITIES, TEMPERATURE, Loss
from bench.gate import Expected
from bench.kd import DTYPES, MODES, Arena, default_rows
from bench.measure import Case, Contender
from bench.providers import able, compile_now, implementation
from fastkd import TopK, _dispatch
from fastkd.testing import exact_and_error

PROVIDERS = ("eager", "compiled", "cross-entropy", "fastkd", "fastkd-overwrite")
OURS = ("fastkd", "fastkd-overwrite")
VOCABULARIES = (50257, 128256)
K = 128
SAMPLED_ROWS = 16
LEAST_TAIL = 2.0**-24  # of its probability, where what is known is nearly everything


class Gate:
    """What is exact, by the formula in float64, independent of fastkd."""

    def __init__(self, arena: Arena, teacher: TopK, divergence: str) -> None:
        self.arena, self.teacher, self.divergence = arena, teacher, divergence
        rows = len(arena.memory)
        self.picked = torch.linspace(0, rows - 1, min(rows, SAMPLED_ROWS), device=arena.memory.device).long()
        self.sample = self._expected(self.picked)
        slices = torch.arange(rows, device=self.picked.device).split(max(1, 2**23 // arena.memory.shape[1]))
        student, log_probs = arena.pristine, teacher.log_probs
        sums = [self._rows(student[part].double(), log_probs[part].double(), part).sum() for part in slices]
        self.mean = torch.stack(sums).sum() / rows

    def check(self, contender: Contender) -> None:
        contender.prepare()
        loss, *rest = contender.run()
        grad = rest[0][self.picked] if rest else None
        if contender.name == "cross-entropy":
            return  # the bench of kd_loss checks these kernels
        if contender.name not in OURS:
            gate.check_eager(contender.name, loss, grad, self.mean, self.sample, self.arena.memory.dtype)
            return
        gate.check_mean(contender.name, loss, self.mean, self.sample)
        if grad is not None:
            gate.check_gradient(contender.name, grad, self.sample)

    def _expected(self, picked: Tensor) -> Expected:
        def reference(student: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
            leaf = student.detach().requires_grad_()
            losses = self._rows(leaf, log_probs, picked)
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
            return losses.detach(), grad

        tensors = self.arena.pristine[picked], self.teacher.log_probs[picked]
        (loss, grad), (loss_error, grad_error) = exact_and_error(reference, *tensors)
        return Expected(loss, loss_error, grad, grad_error.unsqueeze(-1), torch.zeros_like(loss_error[:1]))

    def _rows(self, student: Tensor, log_probs: Tensor, rows: Tensor) -> Tensor:
        """Every row's loss. The tail is a sum over the other ids, which keeps its digits however small it is."""
        ids, target = self.teacher.indices[rows], self.arena.target[rows]
        log_q = F.log_softmax(student / TEMPERATURE, -1)
        tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        events = torch.cat([log_q.gather(-1, ids), tail], -1)
        taught = torch.cat([log_probs, _rest(log_probs)], -1)
        compare = ON_LOG_PROBABILITIES[self.divergence]
        soft = torch.stack([compare(p[None], q[None]) for p, q in zip(taught, events, strict=True)])
        hard = F.cross_entropy(student, target, reduction="none")
        return ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft


def _rest(log_probs: Tensor) -> Tensor:
    return (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_TAIL).log()


def eager(divergence: str, teacher: TopK) -> Loss:
    compare = ON_LOG_PROBABILITIES[divergence]

    def loss(student: Tensor, _: Tensor, target: Tensor) -> Tensor:
        log_q = F.log_softmax(student / TEMPERATURE, -1).gather(-1, teacher.indices)
        events = torch.cat([log_q, _rest(log_q)], -1)
        taught = torch.cat([teacher.log_probs, _rest(teacher.log_probs)], -1)
        return ALPHA * F.cross_entropy(student, target) + (1 - ALPHA) * TEMPERATURE**2 * compare(taught, events)

    return loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab", nargs="+", type=int, default=VOCABULARIES, help="default: 50257 128256")
    parser.add_argument("--rows", type=int, help="default: what memory allows")
    parser.add_argument("--k", nargs="+", type=int, default=(K,), help=f"default: {K}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, bfloat16 on CUDA")
    names = tuple(ON_LOG_PROBABILITIES)
    parser.add_argument("--divergence", nargs="+", default=("forward_kl",), choices=names, metavar="NAME")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="default: both")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # All sizes before the first allocation: what is free later depends on what ran before.
    rows = {vocab: args.rows or default_rows(vocab, dtype, device) for vocab in args.vocab}
    for vocab in args.vocab:
        arena = Arena(rows[vocab], vocab, dtype, device)
        for k in args.k:
            teacher = TopK.from_logits(arena.teacher, k, temperature=TEMPERATURE)
            for divergence in args.divergence:
                truth = Gate(arena, teacher, divergence)
                for mode in args.mode:
                    yield case(arena, truth, mode, args)


def case(arena: Arena, truth: Gate, mode: str, args: argparse.Namespace) -> Case:
    """Everyone who can run, checked."""
    names = [name for name in args.providers if not (name == "fastkd-overwrite" and mode == "forward")]
    contenders, absent = able(names, lambda name: _contender(name, arena, truth, mode, args.impl), truth.check)
    rows, vocab = arena.memory.shape
    labels = {
        "divergence": truth.divergence,
        "mode": mode,
        "dtype": str(arena.memory.dtype).removeprefix("torch."),
        "rows": rows,
        "vocab": vocab,
        "k": truth.teacher.k,
    }
    walks = 1 if mode == "forward" else 2
    return Case(
        labels,
        contenders,
        inputs=(*arena.inputs, *truth.teacher.tensors()),
        absent=absent,
        least_bytes=arena.memory.nbytes * (1 if mode == "forward" else 3),
        least_exponentials=arena.memory.numel() * walks,
    )


def _contender(name: str, arena: Arena, truth: Gate, mode: str, impl: str | None) -> Contender:
    if name in ("eager", "compiled"):
        ran, loss = "", eager(truth.divergence, truth.teacher)
    else:
        ran = implementation("kd_loss(TopK)", impl, arena.memory, truth.teacher.log_probs)
        loss = _fastkd(name, truth, impl)
    if name == "compiled":
        torch._dynamo.reset()  # else the recompilations of a long run count against one limit
        loss = torch.compile(loss, dynamic=False)
    contender = Contender(name, arena.runner(mode, loss), arena.restore, ran)
    if name == "compiled":
        compile_now(contender)
    return contender


def _fastkd(name: str, truth: Gate, impl: str | None) -> Loss:
    if name == "cross-entropy":
        return lambda student, _, target: fastkd.cross_entropy(student, target, impl=impl)
    options = {"divergence": truth.divergence, "beta": BETA.get(truth.divergence), "temperature": TEMPERATURE}
    options |= {"alpha": ALPHA, "impl": impl, "overwrite_student": name == "fastkd-overwrite"}
    return lambda student, _, target: fastkd.kd_loss(student, truth.teacher, target, **options)
