"""Losses on the relations of a batch: distances, angles, similarities; against published eager code.

A loss takes one entry in ``RELATIONS``. All get the same features; ``fastkd-prepared`` gets the teacher's prepared,
as in an epoch that repeats batches. fastkd's numbers are held to the bar of :mod:`fastkd.testing` on the first rows, by
the eager formula in float64; all are compared at full size with fastkd's own float64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from bench import gate, relation_eager
from bench.gate import Wrong
from bench.kd import DTYPES, MODES
from bench.measure import Case, Contender
from bench.providers import able, compile_now, implementation
from bench.relation_rivals import RIVALS
from fastkd import _dispatch
from fastkd.testing import assert_as_exact_as_fp32

PROVIDERS = ("eager", "compiled", *RIVALS, "fastkd", "fastkd-prepared")
FIRST_ROWS = 24
BAR = 1e-5  # of fastkd at full size, relative to its own float64; the first rows have the strict one

Loss = Callable[..., Tensor]


class Relation(NamedTuple):
    naive: Loss  # student, teacher
    ours: Loss
    shapes: tuple[tuple[int, int, int], ...]  # N, D and the teacher's D
    positions: tuple[int, ...] = ()  # of maps (N, D, *positions)


RELATIONS = {
    "rkd-angle": Relation(relation_eager.rkd_angle, fastkd.rkd_angle_loss, ((64, 512, 512), (256, 512, 512))),
    "rkd-distance": Relation(relation_eager.rkd_distance, fastkd.rkd_distance_loss, ((256, 512, 512),)),
    "pkt": Relation(relation_eager.pkt, fastkd.pkt_loss, ((256, 512, 512),)),
    "gram": Relation(relation_eager.gram, fastkd.gram_loss, ((4096, 128, 128), (256, 512, 512))),
    "similarity-preserving": Relation(
        relation_eager.similarity_preserving, fastkd.similarity_preserving_loss, ((4096, 128, 128), (256, 512, 512))
    ),
    "cka": Relation(relation_eager.cka, fastkd.cka_loss, ((4096, 128, 128), (256, 512, 512))),
    "nst": Relation(relation_eager.nst, fastkd.nst_loss, ((8, 256, 256),), (7, 7)),
    "attention-transfer": Relation(
        relation_eager.attention_transfer, fastkd.attention_transfer_loss, ((64, 256, 512),), (14, 14)
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", nargs="+", default=tuple(RELATIONS), choices=RELATIONS, help="default: all")
    parser.add_argument("--rows", type=int, help="default: of each loss")
    parser.add_argument("--width", type=int, help="of student and teacher; default: of each loss")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--mode", nargs="+", default=MODES[1:], choices=MODES, help=f"default: {MODES[1]}")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for name in args.loss:
        shapes = [
            (args.rows or n, args.width or d, args.width or d_teacher) for n, d, d_teacher in RELATIONS[name].shapes
        ]
        for shape in dict.fromkeys(shapes):
            problem = Problem(name, *shape, getattr(torch, args.dtype), device, args.impl)
            for mode in args.mode:
                yield case(problem, mode, args)


class Problem:
    """Features that are related, and what is exact of them."""

    def __init__(
        self, name: str, n: int, d: int, d_teacher: int, dtype: torch.dtype, device: torch.device, impl: str | None
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        self.name, self.relation, self.impl = name, RELATIONS[name], impl
        positions = self.relation.positions
        student = normal(n, d, *positions)
        related = (student.movedim(1, -1) @ normal(d, d_teacher)).movedim(-1, 1) / d**0.5
        teacher = related + normal(n, d_teacher, *positions)
        self.student, self.teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        self.prepared = fastkd.prepare_teacher(self.teacher)
        self.exact = with_gradient(self.relation.ours, self.student.double(), self.teacher.double())

    def check(self, contender: Contender) -> None:
        bar = BAR if contender.name.startswith("fastkd") else gate.EAGER_BAR[self.student.dtype]
        loss, *rest = contender.run()
        exact, slope = self.exact
        gate.within(f"{contender.name}: loss", loss.double(), exact, bar * exact.abs())
        for grad in rest:
            own = 0.0 if self.student.dtype is torch.float32 else torch.finfo(self.student.dtype).eps
            error = float((grad.double() - slope).norm() / slope.norm())
            if not error <= bar + own:
                raise Wrong(f"{contender.name}: gradient is off by {error:.1e} of its norm, the bar is {bar + own:.0e}")

    def check_first_rows(self, loss: Loss) -> None:
        rows = max(2, FIRST_ROWS // math.prod(self.relation.positions))  # eager code is large where there are positions
        first = slice(min(len(self.student), rows))
        student, teacher = self.student.detach()[first], self.teacher[first]
        value, grad = with_gradient(loss, student, teacher)

        def formula(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = with_gradient(self.relation.naive, s, t)
            return value.reshape(1), grad

        try:
            assert_as_exact_as_fp32((value.reshape(1), grad), formula, student, teacher)
        except AssertionError as error:
            raise Wrong(f"fastkd: {error}") from error


def with_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def case(problem: Problem, mode: str, args: argparse.Namespace) -> Case:
    """Everyone who can run, checked."""
    contenders, absent = able(args.providers, lambda name: _contender(name, problem, mode), problem.check)
    labels = {
        "loss": problem.name,
        "mode": mode,
        "dtype": str(problem.student.dtype).removeprefix("torch."),
        "rows": len(problem.student),
        "width": problem.student.shape[1],
        "teacher_width": problem.teacher.shape[1],
        "positions": " x ".join(map(str, problem.relation.positions)),
    }
    return Case(labels, contenders, inputs=(problem.student, problem.teacher), absent=absent)


def _contender(name: str, problem: Problem, mode: str) -> Contender:
    relation, ran, teacher = problem.relation, "", problem.teacher
    loss = RIVALS[name](problem.name) if name in RIVALS else relation.naive
    if name.startswith("fastkd"):
        ran = implementation(relation.ours.__name__, problem.impl, problem.student, problem.teacher)
        problem.check_first_rows(lambda s, t: relation.ours(s, t, impl=problem.impl))
    if name == "compiled":
        torch._dynamo.reset()  # else the recompilations of a long run count against one limit
        loss = torch.compile(loss, dynamic=False)

    def value() -> Tensor:
        if not ran:
            return loss(problem.student, teacher)
        taught = problem.prepared if name == "fastkd-prepared" else teacher
        return relation.ours(problem.student, taught, impl=problem.impl)

    def run() -> tuple[Tensor, ...]:
        if mode == "forward":
            with torch.no_grad():
                return (value(),)
        result = value()
        return result.detach(), *torch.autograd.grad(result, problem.student)

    contender = Contender(name, run, impl=ran)
    if name == "compiled":
        compile_now(contender)
    return contender
