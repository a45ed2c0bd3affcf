"""Problems for the logit losses, and their exact answers, computed once for all implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.testing import exact_and_error, flat_logits, peaked_logits

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "cross_entropy", "mse")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Inputs made from a seed, so that a problem can be the key of a cache."""

    divergence: str
    dtype: torch.dtype = torch.float32
    logits: str = "peaked"
    rows: int = 4
    vocabulary: int = 300
    option: str = "plain"
    teacher_dtypes: tuple[torch.dtype, ...] = field(default=())

    def __str__(self) -> str:
        storage = str(self.dtype).removeprefix("torch.")
        return f"{self.divergence}-{storage}-{self.logits}-{self.rows}x{self.vocabulary}-{self.option}"

    def tensors(self) -> tuple[Tensor, ...]:
        """The student, then the teachers."""
        make: Callable[..., Tensor] = LOGITS[self.logits]
        extra = 7 if self.option == "shared_vocab" else 0
        student = make(self.rows, self.vocabulary + extra, seed=1, dtype=self.dtype)
        count = 2 if self.option.startswith("two_teachers") else 1
        dtypes = self.teacher_dtypes or (self.dtype,) * count
        return student, *(make(self.rows, self.vocabulary, seed=2 + k, dtype=dtype) for k, dtype in enumerate(dtypes))

    def options(self) -> dict[str, Any]:
        return {"divergence": self.divergence, **OPTIONS[self.option](self.rows, self.vocabulary)}

    def upstream(self) -> Tensor:
        """Not 1, and as large as a sum's: a mean's gradients are so small that every bar passes."""
        return torch.linspace(0.5, 1.5, self.rows, dtype=torch.float64)


def rising_logits(rows: int, vocabulary: int, **kwargs: Any) -> Tensor:
    """The largest logit is the last: whoever walks over a row in tiles finds a new maximum in every one."""
    return peaked_logits(rows, vocabulary, **kwargs) + torch.linspace(0, 60, vocabulary)


LOGITS = {"peaked": peaked_logits, "flat": flat_logits, "rising": rising_logits}


def _labels(rows: int, vocabulary: int) -> Tensor:
    return torch.arange(rows) * 7919 % vocabulary


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda n, v: {},
    "hard": lambda n, v: {"target": _labels(n, v), "alpha": 0.3},
    "temperature_2": lambda n, v: {"target": _labels(n, v), "temperature": 2.0},
    "temperature_4": lambda n, v: {"target": _labels(n, v), "temperature": 4.0},
    "temperature_0.7": lambda n, v: {"target": _labels(n, v), "temperature": 0.7, "scale_by_t2": False},
    "teacher_temperature": lambda n, v: {"temperature": 1.0, "teacher_temperature": 3.0},
    "smoothing": lambda n, v: {"target": _labels(n, v), "label_smoothing": 0.1, "z_loss": 0.01, "temperature": 3.0},
    "by_row": lambda n, v: {
        "target": _labels(n, v),
        "temperature": torch.linspace(0.5, 4, n),
        "teacher_temperature": torch.linspace(2, 1, n),
        "alpha": torch.linspace(0, 1, n),
        "row_weight": torch.linspace(2, 0, n),
    },
    "ignored": lambda n, v: {"target": _labels(n, v).index_fill(0, torch.arange(0, n, 2), -1), "ignore_index": -1},
    "shared_vocab": lambda n, v: {
        "target": _labels(n, v + 7).index_fill(0, torch.tensor([0]), v + 3),
        "shared_vocab": v - 2,
        "temperature": 2.0,
    },
    "a_third_shared": lambda n, v: {
        "target": _labels(n, v),
        "shared_vocab": v // 3,
        "label_smoothing": 0.1,
    },
    "two_teachers": lambda n, v: {
        "target": _labels(n, v),
        "temperature": 1.5,
        "teacher_temperature": [1.0, 2.0],
        "teacher_weight": (0.25, 0.5),
    },
    "two_teachers_by_row": lambda n, v: {"teacher_weight": torch.linspace(0, 1, 2 * n).reshape(n, 2)},
    "hard_only": lambda n, v: {"target": _labels(n, v), "alpha": 1.0, "label_smoothing": 0.05},
    "standardize": lambda n, v: {"target": _labels(n, v), "temperature": 2.0, "standardize": True},
    "standardize_by_row": lambda n, v: {
        "temperature": torch.linspace(0.5, 4, n),
        "teacher_temperature": 1.5,
        "row_weight": torch.linspace(2, 0.5, n),
        "standardize": True,
        "scale_by_t2": False,
    },
    "two_teachers_standardized": lambda n, v: {
        "target": _labels(n, v),
        "teacher_weight": torch.linspace(0, 1, 2 * n).reshape(n, 2),
        "shared_vocab": v - 2,
        "standardize": True,
    },
    "beta": lambda n, v: {"target": _labels(n, v), "beta": 0.9},
}
BETA_TAKERS = ("jsd", "skew_kl", "skew_reverse_kl")


def has(divergence: str, option: str) -> bool:
    """Whether a divergence takes an option."""
    if option == "beta":
        return divergence in BETA_TAKERS
    return divergence != "mse" or "standardize" not in option


def evaluate(impl: str, student: Tensor, *teachers: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of every row and the gradient, on the device that `impl` needs."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    leaf = student.detach().to(device).requires_grad_()
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = fastkd.kd_loss(leaf, [t.to(device) for t in teachers], reduction="none", impl=impl, **moved)
    loss.backward(upstream.to(loss))
    assert leaf.grad is not None
    return loss.detach().cpu(), leaf.grad.cpu()


def reference(problem: Problem) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *tensors: evaluate("reference", *tensors, upstream=problem.upstream(), **problem.options())


@cache
def answer(problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor | float, ...]]:
    """Exact loss and gradient, their E, and what a kink allows more."""
    exact, error = exact_and_error(reference(problem), *problem.tensors())
    kink = kink_allowance(problem) if problem.divergence == "tvd" else 0.0
    return exact, error, (0.0, kink)


def kink_allowance(problem: Problem) -> Tensor | float:
    """tvd where |p - q| <= 1e-5 (p + q): any subgradient is right there, and omega moves with it in the whole row."""
    options = problem.options()
    student, *teachers = (x.double() for x in problem.tensors())
    shared = options.get("shared_vocab", student.shape[1])
    spread = torch.ones(())
    if options.get("standardize"):
        spread = 1e-7 + student[:, :shared].std(-1, keepdim=True)
        student, *teachers = (x / (1e-7 + x[:, :shared].std(-1, keepdim=True)) for x in (student, *teachers))

    def column(value: Any) -> Any:
        return value.double().unsqueeze(-1) if isinstance(value, Tensor) else value

    temperature = column(options.get("temperature", 1.0))
    teacher_temperature = options.get("teacher_temperature", temperature)
    q = torch.softmax(student[:, :shared] / temperature, -1)
    allowed = torch.zeros_like(student)
    for k, teacher in enumerate(teachers):
        own = teacher_temperature[k] if isinstance(teacher_temperature, list) else column(teacher_temperature)
        p = torch.softmax(teacher[:, :shared] / own, -1)
        tie = (p - q).abs() <= 1e-5 * (p + q)
        mass = torch.where(tie, q, 0.0).sum(-1, keepdim=True)
        allowed[:, :shared] += problem.upstream().unsqueeze(-1) * temperature / spread * q * (tie + mass)
    return allowed
