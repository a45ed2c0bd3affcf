"""attention_kl_loss against the matrices that it does without: matmul, log_softmax and kl_div, eager and compiled.

Queries and keys of one layer, student and teacher of one size, to a mean loss and the gradients of the student's two.
Eager code keeps some six tensors of (heads, tokens, tokens).

The least that anybody computes are four products: both models' scores, and from the scores' gradient those of queries
and keys. Their rate is measured in the same rounds, a head at a time. fastkd makes the scores a second time in
backward, which is two products more. Under a causal mask half of each is enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench import gate
from bench.gate import Expected, Wrong
from bench.kd import DTYPES, MODES
from bench.measure import Case, Contender
from bench.providers import able, compile_now, implementation
from fastkd import _dispatch
from fastkd.testing import exact_and_error

PROVIDERS = ("eager", "compiled", "fastkd")
TOKENS = {"cpu": (1024, 4096), "cuda": (4096, 16384)}
HEADS, DIM = 8, 64
CAUSAL = ("no", "yes")
CAUSAL_BLOCK = 512
SPREAD = 1.5  # of queries and keys: some keys of a row count, and most do not
SAMPLED_ROWS = 16
SLICE = 2**22  # scores at a time, where they are exact
KEYS_BAR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # relative, in the norm

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Arena(NamedTuple):
    """The tensors of one problem, and whether a query sees its own past alone."""

    queries: Tensor  # (batch, heads, tokens, dim), of the student
    keys: Tensor
    teacher_queries: Tensor
    teacher_keys: Tensor
    causal: bool

    @property
    def rows(self) -> int:
        return self.queries.numel() // self.queries.shape[-1]

    def runner(self, mode: str, loss_of: Loss) -> Callable[[], tuple[Tensor, ...]]:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss_of(*self[:4]),)

        def forward_and_backward() -> tuple[Tensor, ...]:
            loss = loss_of(*self[:4])
            # As under a loss scaler: a mean's gradients would underflow in float16.
            return loss.detach(), *torch.autograd.grad(loss, self[:2], torch.full_like(loss, self.rows))

        return forward if mode == "forward" else forward_and_backward


def arena(
    batch: int, tokens: int, heads: int, dim: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Arena:
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, heads, dim)  # as a model's projection leaves them
    teacher = [SPREAD * torch.randn(shape, device=device, generator=generator) for _ in range(2)]
    student = [x + torch.randn(shape, device=device, generator=generator) for x in teacher]
    queries, keys, *rest = (x.to(dtype).transpose(1, 2) for x in (*student, *teacher))
    return Arena(queries.requires_grad_(), keys.requires_grad_(), *rest, causal)


class Products:
    """The products that no implementation can do without, in memory that is there already.

    Under a causal mask a block of queries is multiplied by the keys up to its last.
    """

    def __init__(self, arena: Arena, mode: str) -> None:
        self.arena, self.backward = arena, mode != "forward"
        tokens, dim = arena.queries.shape[2:]
        size = min(tokens, CAUSAL_BLOCK) if arena.causal else tokens
        # Of each block of queries: the first, the end, and how many keys.
        ends = [(i, min(i + size, tokens)) for i in range(0, tokens, size)]
        self.blocks = [(i, end, end if arena.causal else tokens) for i, end in ends]
        self.scores = arena.queries.new_zeros(size * tokens)
        self.of_queries, self.of_keys = (arena.queries.new_zeros((tokens, dim)) for _ in range(2))
        pairs = sum((end - i) * keys for i, end, keys in self.blocks) * arena.rows // tokens
        self.work = 2 * pairs * dim * (4 if self.backward else 2)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        for tensors in zip(*(x.flatten(0, 1) for x in self.arena[:4]), strict=True):
            for i, end, count in self.blocks:
                queries, keys, teacher_queries, teacher_keys = (
                    x[i:end] if side % 2 == 0 else x[:count] for side, x in enumerate(tensors)
                )
                scores = self.scores[: (end - i) * count].view(end - i, count)
                torch.mm(teacher_queries, teacher_keys.t(), out=scores)
                torch.mm(queries, keys.t(), out=scores)
                if self.backward:
                    torch.mm(scores, keys, out=self.of_queries[i:end])
                    torch.mm(scores.t(), queries, out=self.of_keys[:count])
        return self.of_queries, self.of_keys


class Gate:
    """What is exact, by the formula in float64, independent of fastkd: the mean, some rows, and one head's keys."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        tokens, device = arena.queries.shape[2], arena.queries.device
        self.picked = torch.linspace(0, tokens - 1, min(tokens, SAMPLED_ROWS), device=device).long()
        self.sample = self._expected()
        heads = zip(*(x.detach().flatten(0, 1) for x in arena[:4]), strict=True)
        total, self.of_keys = torch.zeros((), dtype=torch.float64, device=device), None
        for tensors in heads:
            loss, of_keys = self._head(*(x.double() for x in tensors), self.of_keys is None)
            self.of_keys = of_keys if self.of_keys is None else self.of_keys
            total += loss
        self.mean = total / arena.rows

    def check(self, contender: Contender) -> None:
        loss, *gradients = contender.run()
        dtype = self.arena.queries.dtype
        of_queries = gradients[0][0, 0, self.picked] if gradients else None
        if contender.name == "fastkd":
            gate.check_mean(contender.name, loss, self.mean, self.sample)
            if of_queries is not None:
                gate.check_gradient(contender.name, of_queries, self.sample)
        else:
            gate.check_eager(contender.name, loss, of_queries, self.mean, self.sample, dtype)
        if gradients:
            error = float((gradients[1][0, 0].double() - self.of_keys).norm() / self.of_keys.norm())
            bar = KEYS_BAR[dtype] if contender.name == "fastkd" else gate.EAGER_BAR[dtype]
            if not error <= bar:
                raise Wrong(f"{contender.name}: gradient of keys is off by {error:.1e} of its norm, the bar is {bar}")

    def _expected(self) -> Expected:
        """Rows of the first head."""
        queries, keys, teacher_queries, teacher_keys = (x.detach()[0, 0] for x in self.arena[:4])

        def reference(queries: Tensor, keys: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
            leaf = queries.detach().requires_grad_()
            losses = self._rows(leaf, keys, *teacher, self.picked)
            return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

        given = queries[self.picked], keys, teacher_queries[self.picked], teacher_keys
        (loss, grad), (loss_error, grad_error) = exact_and_error(reference, *given)
        return Expected(loss, loss_error, grad, grad_error.unsqueeze(-1), torch.zeros_like(loss_error[:1]))

    def _head(
        self, queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, with_keys: bool
    ) -> tuple[Tensor, Tensor]:
        """The sum of a head's rows, and the gradient of its keys."""
        total, leaf = torch.zeros((), dtype=torch.float64, device=keys.device), keys.requires_grad_(with_keys)
        of_keys = torch.zeros_like(keys)
        for rows in torch.arange(len(queries), device=keys.device).split(max(1, SLICE // len(keys))):
            loss = self._rows(queries[rows], leaf, teacher_queries[rows], teacher_keys, rows).sum()
            total += loss.detach()
            if with_keys:
                of_keys += torch.autograd.grad(loss, leaf)[0]
        return total, of_keys

    def _rows(
        self, queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, rows: Tensor
    ) -> Tensor:
        hidden = self.arena.causal & (torch.arange(len(keys), device=keys.device) > rows.unsqueeze(-1))
        log_q, log_p = (
            F.log_softmax((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -1e30), -1)
            for q, k in ((queries, keys), (teacher_queries, teacher_keys))
        )
        return torch.where(hidden, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def eager(causal: bool) -> Loss:
    def loss(queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor) -> Tensor:
        tokens, scale = queries.shape[2], queries.shape[3] ** -0.5
        log_q = scale * (queries @ keys.mT)
        log_p = scale * (teacher_queries @ teacher_keys.mT)
        if causal:
            hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=queries.device).triu(1)
            lowest = torch.finfo(torch.float32).min / 2  # not -inf: kl_div would make NaN of it
            log_q, log_p = (x.float().masked_fill(hidden, lowest) for x in (log_q, log_p))
        log_q, log_p = (F.log_softmax(x, -1, dtype=torch.float32) for x in (log_q, log_p))
        rows = queries.shape[0] * queries.shape[1] * tokens
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / rows

    return loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 1024 4096, on CUDA 4096 16384")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--heads", type=int, default=HEADS, help=f"default: {HEADS}")
    parser.add_argument("--dim", type=int, default=DIM, help=f"of a head; default: {DIM}")
    parser.add_argument("--causal", nargs="+", default=CAUSAL, choices=CAUSAL, help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, bfloat16 on CUDA")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="default: both")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    for tokens in args.tokens or TOKENS[device.type]:
        for causal in args.causal:
            problem = arena(args.batch, tokens, args.heads, args.dim, causal == "yes", dtype, device)
            truth = Gate(problem)
            for mode in args.mode:
                yield case(problem, truth, mode, args)


def case(arena: Arena, truth: Gate, mode: str, args: argparse.Namespace) -> Case:
    """Everyone who can run, checked."""
    contenders, absent = able(args.providers, lambda name: _contender(name, arena, mode, args.impl), truth.check)
    batch, heads, tokens, dim = arena.queries.shape
    labels = {
        "mode": mode,
        "dtype": str(arena.queries.dtype).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "dim": dim,
        "causal": "yes" if arena.causal else "no",
    }
    return Case(labels, contenders, absent=absent, inputs=arena[:4], matmul=Products(arena, mode))


def _contender(name: str, arena: Arena, mode: str, impl: str | None) -> Contender:
    ran = ""
    if name == "fastkd":
        ran = implementation("attention_kl_loss", impl, arena.queries, arena.teacher_queries)

        def loss(*tensors: Tensor) -> Tensor:
            return fastkd.attention_kl_loss(*tensors, causal=arena.causal, impl=impl)
    else:
        loss = eager(arena.causal)
    if name == "compiled":
        torch._dynamo.reset()  # else the recompilations of a long run count against one limit
        loss = torch.compile(loss, dynamic=False)
    contender = Contender(name, arena.runner(mode, loss), impl=ran)
    if name == "compiled":
        compile_now(contender)
    return contender
