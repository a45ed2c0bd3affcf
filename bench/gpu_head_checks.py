"""Checks of a loss on heads, for ``bench/gpu_checks.py``: the matmuls that it needs of torch, and its numbers.

On a GPU a head multiplies 16-bit operands and takes float32 from the matmul (``out_dtype``), which not every version of
torch does in every one of these calls. So each is tried by itself, and all that fail are named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.data import Heads, peaked_heads
from bench.gate import Wrong
from bench.head_gate import Gate
from fastkd import Head

SIZES = {"cuda": (300, 5003), "cpu": (6, 257)}  # rows and vocabulary; an interpreter of kernels takes its time
HIDDEN, TEACHER_HIDDEN = 48, 64
IGNORED = -100
DIVERGENCES = ("forward_kl", "jsd")
BAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative, in the norm
WIDE = torch.float32
KD = Callable[..., Tensor]


def _heads(device: str, dtype: torch.dtype) -> Heads:
    return peaked_heads(*SIZES[device], HIDDEN, TEACHER_HIDDEN, dtype=dtype, device=device)


def _several_chunks(device: str) -> int:
    """Bytes for a third of the rows of two heads."""
    rows, vocab = SIZES[device]
    return 2 * 4 * vocab * rows // 3


def matmuls(device: str) -> None:
    """Every call that a head makes of torch, by itself, against the same in float64."""
    failed = []
    for name, (call, want) in _calls(device).items():
        try:
            error = float((call().double() - want).norm() / want.norm())
        except Exception as reason:  # whatever it is, the other calls are tried too
            failed.append(f"{name}: {type(reason).__name__}: {' '.join(str(reason).split()[:30])}")
        else:
            if not error < 1e-5:
                failed.append(f"{name}: off by {error:.1e} of its norm, so it rounds to 16 bits or adds up in them")
    if failed:
        raise Wrong("; ".join(failed))


def _calls(device: str) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Name -> the call, and what it has to give."""
    found: dict[str, tuple[Callable[[], Tensor], Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        who = str(dtype).removeprefix("torch.")
        heads = _heads(device, dtype)
        x, w = heads.input, heads.weight
        g = torch.randn(SIZES[device], device=device).to(dtype)
        logits, total = x.double() @ w.double().t(), g.double().t() @ x.double()
        out, kept = logits.new_empty(logits.shape, dtype=WIDE), torch.randn(total.shape, device=device)
        found |= {
            f"{who} logits, torch.mm(input, weight.t(), out_dtype=float32, out=)": (
                partial(torch.mm, x, w.t(), out_dtype=WIDE, out=out),
                logits,
            ),
            f"{who} gradient of the input, torch.mm(gradient, weight, out_dtype=float32)": (
                partial(torch.mm, g, w, out_dtype=WIDE),
                g.double() @ w.double(),
            ),
        }
        for beta in (0, 1):
            name = f"{who} sum of the weight's gradient, torch.addmm(total, .., out_dtype=float32, beta={beta}, out=)"
            found[name] = partial(_added, kept.clone(), g, x, beta), beta * kept.double() + 0.5 * total
    return found


def _added(total: Tensor, gradient: Tensor, hidden: Tensor, beta: float) -> Tensor:
    return torch.addmm(total, gradient.t(), hidden, out_dtype=WIDE, beta=beta, alpha=0.5, out=total)


def numbers(device: str, dtype: torch.dtype, kd: KD) -> None:
    """Value and gradients, in one chunk and in several, with the student's head in training and frozen."""
    heads = _heads(device, dtype)
    teacher = Head(heads.teacher_input, heads.teacher_weight)
    for divergence in DIVERGENCES if device == "cuda" else DIVERGENCES[:1]:
        options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.5}
        truth = Gate(heads, soft_only=False, **options)
        for workspace, precision, frozen in product((_several_chunks(device), None), (None, "float32"), (False, True)):
            student = heads.input.detach().requires_grad_(), heads.weight.detach().requires_grad_(not frozen)
            loss = kd(Head(*student, grad_precision=precision, workspace=workspace), teacher, heads.target, **options)
            wanted = student[:1] if frozen else student
            gradients = torch.autograd.grad(loss, wanted, torch.full_like(loss, len(heads.input)))
            rounded = precision is None and device == "cuda" and dtype.itemsize == 2
            who = f"{divergence}, workspace {workspace}, precision {precision}, frozen {frozen}"
            truth.check(who, loss.detach(), gradients, len(heads.input), rounded)


def everything(device: str, dtype: torch.dtype, kd: KD) -> None:
    """Bias, scale, softcap and a dropped row of NaN; the mean and every row's loss; under autocast, where there is."""
    for reduction in ("mean", "none"):
        exact = _step(device, torch.float64, dtype, reduction, _reference)
        _compare(f"reduction {reduction}", _step(device, dtype, dtype, reduction, kd), exact, BAR[dtype])
    if device == "cuda" and dtype is torch.float32:
        with torch.autocast("cuda", torch.bfloat16):
            got = _step(device, dtype, dtype, "none", kd)
        _compare("autocast", got, exact, BAR[torch.bfloat16])


def _step(device: str, dtype: torch.dtype, storage: torch.dtype, reduction: str, loss_of: KD) -> list[Tensor]:
    """Loss and gradients, computed in ``dtype`` from numbers that ``storage`` can hold."""
    heads = _heads(device, storage)
    bias = torch.linspace(-1, 1, len(heads.weight), device=device).to(storage)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (heads.input, heads.weight, bias)]
    heads.target[3] = IGNORED
    with torch.no_grad():
        leaves[0][3] = 0 if loss_of is _reference else torch.nan
    student = Head(*leaves, scale=0.75, softcap=20.0, workspace=_several_chunks(device))
    teacher = Head(heads.teacher_input.to(dtype), heads.teacher_weight.to(dtype))
    loss = loss_of(student, teacher, heads.target, temperature=2.0, alpha=0.5, reduction=reduction)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]


def _reference(student: Head, teacher: Head, target: Tensor, **options: Any) -> Tensor:
    return fastkd.kd_loss(student.logits(), teacher.logits(), target, impl="reference", **options)


def _compare(who: str, got: list[Tensor], exact: list[Tensor], bar: float) -> None:
    for name, one, want in zip(("loss", "of the input", "of the weight", "of the bias"), got, exact, strict=True):
        error = float((one.double() - want).norm() / want.norm())
        if not error <= bar:
            raise Wrong(f"{who}: {name} is off by {error:.1e} of its norm, the bar is {bar:.0e}")


def step_on(device: str, kd: KD) -> Callable[[], None]:
    """A step of training to be watched, in several chunks."""
    heads = _heads(device, torch.bfloat16)
    leaves = heads.input.requires_grad_(), heads.weight.requires_grad_()
    teacher = Head(heads.teacher_input, heads.teacher_weight)

    def step() -> None:
        loss = kd(Head(*leaves, workspace=_several_chunks(device)), teacher, heads.target)
        torch.autograd.grad(loss, leaves)

    return step
