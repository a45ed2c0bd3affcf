"""kd_loss on two heads: hidden states and weights to a loss and their gradients, against logits that are stored.

Eager code computes both models' logits, stores them and all that follows from them, and multiplies back. So does the
same code compiled, without most of what follows. torch's own ``linear_cross_entropy`` has one head, see
``bench/head_rivals.py``; Liger's two losses need a GPU.

The least that a loss of two heads computes is four matmuls: 8 x rows x hidden x vocabulary operations if the models
are of one size. Their rate is measured in the same rounds, each with all rows at once. Extra memory is beside the
inputs and the gradients that are handed out; on a GPU the float32 sum of the weight's gradient counts as extra.

In ``frozen-head`` the student's weight is a constant: three matmuls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench import head_rivals
from bench.data import Heads, peaked_heads
from bench.eager import ALPHA, BETA, TEMPERATURE
from bench.gate import Wrong
from bench.head_gate import Gate
from bench.head_rivals import HeadLoss
from bench.kd import DTYPES
from bench.matmul import Matmul
from bench.measure import Case, Contender
from bench.providers import Unavailable, able, compile_now, implementation, need, rows_that_fit
from fastkd import Head, _dispatch
from fastkd._rows import DIVERGENCES

PROVIDERS = ("eager", "compiled", "linear-cross-entropy", "liger-fused", "liger-chunked", "fastkd", "fastkd-float32")
OURS = ("fastkd", "fastkd-float32")
OF_OUR_OWN = ("eager", "compiled", *OURS)
MODES = ("forward+backward", "frozen-head")
VOCABULARIES = (50257,)
CPU_ROWS, CPU_LOGITS, CPU_HIDDEN = 1024, 2**26, 512
GPU_ROWS, GPU_HIDDEN = 8192, 4096
EAGER_TENSORS = 14  # of the logits' size, that eager code holds at its peak


class Arena:
    """The tensors of one problem."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self.leaves = heads.input.requires_grad_(), heads.weight.requires_grad_()
        self.dtype, self.device, self.rows = heads.input.dtype, heads.input.device, len(heads.input)
        # As under a loss scaler: a mean's gradients would underflow in float16.
        self.upstream = self.rows if self.dtype is torch.float16 else 1

    def runner(self, mode: str, loss_of: HeadLoss) -> Callable[[], tuple[Tensor, ...]]:
        input, weight, *rest = self.heads
        if mode == "frozen-head":
            weight = weight.detach()
        wanted = [x for x in (input, weight) if x.requires_grad]

        def run() -> tuple[Tensor, ...]:
            loss = loss_of(input, weight, *rest)
            upstream = torch.full_like(loss, self.upstream)
            return loss.detach(), *torch.autograd.grad(loss, wanted, upstream)

        return run

    def matmul(self, mode: str) -> Matmul:
        heads = self.heads
        return Matmul((heads.input, heads.weight), (heads.teacher_input, heads.teacher_weight), mode == "frozen-head")

    @property
    def rounds(self) -> bool:
        """Whether the gradient of the logits is rounded to 16 bits, unless that is switched off."""
        return self.device.type == "cuda" and self.dtype.itemsize == 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab", nargs="+", type=int, default=VOCABULARIES, help="default: 50257")
    parser.add_argument("--rows", nargs="+", type=int, help="tokens; default: what memory allows")
    parser.add_argument("--hidden", type=int, help=f"default: {CPU_HIDDEN}, on CUDA {GPU_HIDDEN}")
    parser.add_argument("--teacher-hidden", type=int, help="default: the student's")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, bfloat16 on CUDA")
    parser.add_argument("--divergence", nargs="+", default=("forward_kl",), choices=DIVERGENCES, metavar="NAME")
    parser.add_argument("--soft-only", action="store_true", help="without a target: no cross-entropy beside it")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="default: both")
    parser.add_argument("--workspace", type=int, help="MiB for fastkd's chunks; default: fastkd's own")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    hidden = args.hidden or (GPU_HIDDEN if device.type == "cuda" else CPU_HIDDEN)
    # All sizes before the first allocation: what is free later depends on what ran before.
    sizes = {vocab: args.rows or [default_rows(vocab, dtype, device)] for vocab in args.vocab}
    for vocab in args.vocab:
        for rows in sizes[vocab]:
            heads = peaked_heads(rows, vocab, hidden, args.teacher_hidden or hidden, dtype=dtype, device=device)
            arena = Arena(heads)
            for divergence in args.divergence:
                truth = Gate(heads, args.soft_only, **options_of(divergence))
                for mode in args.mode:
                    yield case(arena, truth, divergence, mode, args)


def case(arena: Arena, truth: Gate, divergence: str, mode: str, args: argparse.Namespace) -> Case:
    """Everyone who can run, checked."""
    # fastkd-float32 only where something is rounded that it could leave as it is.
    names = [name for name in args.providers if arena.rounds or name != "fastkd-float32"]
    contenders, absent = able(
        names,
        lambda name: _contender(name, arena, divergence, mode, args),
        lambda contender: _check(contender, arena, truth, divergence),
    )
    heads = arena.heads
    labels = {
        "divergence": divergence,
        "mode": mode,
        "dtype": str(arena.dtype).removeprefix("torch."),
        "rows": arena.rows,
        "vocab": len(heads.weight),
        "hidden": heads.weight.shape[1],
        "teacher_hidden": heads.teacher_weight.shape[1],
        "hard_term": "no" if args.soft_only else "yes",
        "workspace_mib": args.workspace or "",
    }
    return Case(labels, contenders, absent=absent, inputs=heads, matmul=arena.matmul(mode))


def default_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    most = GPU_ROWS if device.type == "cuda" else min(CPU_ROWS, CPU_LOGITS // vocab)
    return rows_that_fit(EAGER_TENSORS * dtype.itemsize * vocab, device, most)


def options_of(divergence: str) -> dict[str, object]:
    return {"divergence": divergence, "temperature": TEMPERATURE, "alpha": ALPHA, "beta": BETA.get(divergence)}


def _check(contender: Contender, arena: Arena, truth: Gate, divergence: str) -> None:
    """A rival that is not of our own writing and computes something else is left out; else nothing is timed."""
    name = contender.name
    try:
        loss, *gradients = contender.run()
        if name in OURS:
            truth.check(name, loss, gradients, arena.upstream, rounded=arena.rounds and name == "fastkd")
        else:
            other = name == "linear-cross-entropy" and divergence != "cross_entropy"  # by the teacher's entropy
            truth.check_rival(name, None if other else loss, gradients, arena.upstream)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if name in OF_OUR_OWN:
            raise
        said = " ".join(str(error).split()[:40])
        raise Unavailable(said if isinstance(error, Wrong) else f"it fails here: {said}") from error


def _contender(name: str, arena: Arena, divergence: str, mode: str, args: argparse.Namespace) -> Contender:
    if name in OURS:
        ran = implementation("kd_loss", args.impl, arena.heads.input, arena.heads.teacher_input)
        loss = _fastkd(divergence, args, precision="float32" if name == "fastkd-float32" else None)
    else:
        ran, loss = "", _rival(name, divergence, args.soft_only, arena.device)
    contender = Contender(name, arena.runner(mode, loss), impl=ran)
    if name == "compiled":
        compile_now(contender)
    return contender


def _fastkd(divergence: str, args: argparse.Namespace, precision: str | None) -> HeadLoss:
    options = {**options_of(divergence), "impl": args.impl}
    workspace = args.workspace and args.workspace * 2**20

    def loss(input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        student = Head(input, weight, grad_precision=precision, workspace=workspace)
        teacher = Head(teacher_input, teacher_weight, workspace=workspace)
        return fastkd.kd_loss(student, teacher, None if args.soft_only else target, **options)

    return loss


def _rival(name: str, divergence: str, soft_only: bool, device: torch.device) -> HeadLoss:
    if name == "eager":
        return head_rivals.eager(divergence, soft_only)
    if name == "compiled":
        torch._dynamo.reset()  # else the recompilations of a long run count against one limit
        return torch.compile(head_rivals.eager(divergence, soft_only), dynamic=False)
    if name == "linear-cross-entropy":
        if divergence not in head_rivals.LINEAR_CROSS_ENTROPY_HAS:
            raise Unavailable(f"it has no {divergence}")
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
        return head_rivals.linear_cross_entropy(soft_only)
    has = head_rivals.LIGER_BETA if name == "liger-fused" else head_rivals.LIGER_CHUNKED_HAS
    if divergence not in has:
        raise Unavailable(f"it has no {divergence} of two heads")
    if device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    need("liger_kernel")
    return (head_rivals.liger_fused if name == "liger-fused" else head_rivals.liger_chunked)(divergence, soft_only)
