"""Problems for the losses that take the target apart, and the formulas as they are published."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from logit_problems import LOGITS
from torch import Tensor

import fastkd
from fastkd.testing import exact_and_error

# name -> operation, and options for so many rows
CASES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "dkd": ("dkd_loss", lambda n: {}),
    "dkd_at_1": ("dkd_loss", lambda n: {"temperature": 1.0, "alpha": 0.3, "beta": 1.0}),
    "dkd_by_row": ("dkd_loss", lambda n: {"temperature": torch.linspace(0.5, 3, n), "alpha": 2.0}),
    "dkd_of_the_target": ("dkd_loss", lambda n: {"temperature": 1.0, "beta": 0.0}),
    "dkd_of_the_others": ("dkd_loss", lambda n: {"alpha": 0.0, "beta": 1.0, "scale_by_t2": False}),
    "dkd_weighted": ("dkd_loss", lambda n: {"row_weight": torch.linspace(2, 0, n), "scale_by_t2": False}),
    "nkd": ("nkd_loss", lambda n: {}),
    "nkd_of_the_target": ("nkd_loss", lambda n: {"gamma": 0.0}),
    "nkd_at_2": ("nkd_loss", lambda n: {"temperature": 2.0}),
    "nkd_at_4_of_the_target": ("nkd_loss", lambda n: {"temperature": 4.0, "gamma": 0.0}),
    "nkd_at_0.7": ("nkd_loss", lambda n: {"temperature": 0.7, "gamma": 0.5, "scale_by_t2": False}),
    "nkd_by_row": ("nkd_loss", lambda n: {"temperature": torch.linspace(0.5, 3, n)}),
    "nkd_weighted": ("nkd_loss", lambda n: {"temperature": 3.0, "row_weight": torch.linspace(2, 0, n)}),
}


def tensors(rows: int, vocabulary: int, logits: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, target: half of the targets are the teacher's best id."""
    student = LOGITS[logits](rows, vocabulary, seed=1, dtype=dtype)
    teacher = LOGITS[logits](rows, vocabulary, seed=2, dtype=dtype)
    target = torch.arange(rows) * 7919 % vocabulary
    return student, teacher, torch.where(torch.arange(rows) % 2 == 0, teacher.argmax(-1), target)


def upstream(rows: int) -> Tensor:
    return torch.linspace(0.5, 1.5, rows, dtype=torch.float64)


def evaluate(
    impl: str | None, case: str, student: Tensor, teacher: Tensor, target: Tensor, **more: Any
) -> tuple[Tensor, Tensor]:
    """The loss of every row and the gradient, on the device that `impl` needs."""
    op, options = CASES[case]
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    leaf = student.detach().to(device).requires_grad_()
    given = {**options(len(student)), **more}
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    loss = getattr(fastkd, op)(leaf, teacher.to(device), target.to(device), reduction="none", impl=impl, **moved)
    loss.backward(upstream(len(student)).to(loss))
    assert leaf.grad is not None
    return loss.detach().cpu(), leaf.grad.cpu()


def naive(case: str, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Rows of the loss, as the papers write them: of finite logits alone."""
    op, make = CASES[case]
    options = make(len(student))
    is_target = F.one_hot(target, student.shape[1]).bool()
    t = options.get("temperature", 4.0 if op == "dkd_loss" else 1.0)
    t = t.double() if isinstance(t, Tensor) else torch.full((len(student),), t, dtype=torch.float64)
    squared = t**2 if options.get("scale_by_t2", True) else torch.ones_like(t)

    def others(logits: Tensor) -> Tensor:
        return F.log_softmax(logits[~is_target].view(len(logits), -1) / t[:, None], -1)

    log_p, log_q = others(teacher), others(student)
    if op == "nkd_loss":
        of_target = -teacher.softmax(-1)[is_target] * student.log_softmax(-1)[is_target]
        loss = of_target - options.get("gamma", 1.5) * squared * (log_p.exp() * log_q).sum(-1)
    else:
        p, q = ((x / t[:, None]).softmax(-1)[is_target] for x in (teacher, student))
        tckd = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        nckd = (log_p.exp() * (log_p - log_q)).sum(-1)
        loss = squared * (options.get("alpha", 1.0) * tckd + options.get("beta", 8.0) * nckd)
    weight = options.get("row_weight")
    return loss if weight is None else weight * loss


@cache
def answer(
    case: str, rows: int, vocabulary: int, logits: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Exact loss and gradient, and their E."""
    student, teacher, target = tensors(rows, vocabulary, logits, dtype)
    return exact_and_error(lambda s, t: evaluate("reference", case, s, t, target), student, teacher)
