"""Problems for the passes over the student's logits that a teacher of k ids a row needs, and how to solve them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from logit_problems import rising_logits
from torch import Tensor

from fastkd import _dispatch
from fastkd._rows import LogitRows
from fastkd.testing import flat_logits, peaked_logits

OP = "kd_loss(TopK)"
SCALE = torch.tensor(0.4, dtype=torch.float64)
LOGITS: dict[str, Callable[..., Tensor]] = {"peaked": peaked_logits, "flat": flat_logits, "rising": rising_logits}


def labels(n: int, v: int) -> Tensor:
    return torch.arange(n) * 7919 % v


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "soft": lambda n, v: {"target": None, "alpha": 0.0},
    "temperature_2": lambda n, v: {"target": None, "alpha": 0.25, "temperature": 2.0},
    "hard": lambda n, v: {},
    "hard_2": lambda n, v: {"temperature": 2.0, "label_smoothing": 0.1},
    "hard_4": lambda n, v: {"temperature": 4.0, "z_loss": 0.01},
    "hard_0.7": lambda n, v: {"temperature": 0.7, "label_smoothing": 0.1, "z_loss": 0.01},
    "hard_alone": lambda n, v: {"alpha": 1.0, "label_smoothing": 0.1},
    "smoothing": lambda n, v: {"label_smoothing": 0.1, "z_loss": 0.01, "reduce": True},
    "by_row": lambda n, v: {
        "temperature": torch.linspace(0.5, 4, n),
        "alpha": torch.linspace(0, 1, n),
        "row_weight": torch.linspace(2, 0.5, n),
        "reduce": True,
    },
    "weights_of_0": lambda n, v: {"row_weight": torch.arange(n).remainder(2).float(), "agreement": True},
    "ignored": lambda n, v: {"target": labels(n, v).index_fill(0, torch.arange(0, n, 2), -1), "ignore_index": -1},
    "shared": lambda n, v: {"shared": v - 7, "label_smoothing": 0.1, "target": labels(n, v) - n + v - labels(n, v)},
    "a_third_shared": lambda n, v: {"shared": v // 3, "temperature": 2.0},
    "soft_shared": lambda n, v: {"target": None, "alpha": 0.0, "shared": v // 2},
    "overwrite": lambda n, v: {"overwrite": True, "label_smoothing": 0.1},
}


def problem(student: Tensor, **changed: Any) -> LogitRows:
    n, v = student.shape
    values: dict[str, Any] = {
        "student": student,
        "teachers": (),
        "target": labels(n, v),
        "row_weight": None,
        "alpha": 0.3,
        "temperature": 1.0,
        "teacher_temperature": (),
        "teacher_weight": (),
        "divisor": None,
        "divergence": "mse",  # which nobody looks at
        "beta": 0.5,
        "scale_by_t2": True,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "ignore_index": -100,
        "shared": v,
        "reduce": False,
        "agreement": False,
        "overwrite": False,
    }
    return LogitRows(**values | changed)


def make(
    option: str = "hard", n: int = 4, v: int = 300, logits: str = "peaked", dtype: torch.dtype = torch.float32
) -> LogitRows:
    return problem(LOGITS[logits](n, v, seed=1).to(dtype), **OPTIONS[option](n, v))


def names(rows: LogitRows, k: int, seed: int = 0) -> Tensor:
    """k ids a row in random order, the label of a row first where there is one; every seventh entry is absent."""
    n = len(rows.student)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, rows.shared, generator=generator)
    if rows.target is not None and rows.shared > 3:
        taught = (rows.target >= 0) & (rows.target < rows.shared) & (torch.arange(n) % 2 == 0)
        order[torch.arange(n)[taught], rows.target[taught]] = -1.0
    ids = order.argsort(-1)[:, :k].contiguous()
    return ids.masked_fill(torch.arange(k) % 7 == 5, -1)


def slopes_for(ids: Tensor, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ids.shape[0], ids.shape[1] + 1, generator=generator)


def upstream(rows: LogitRows) -> Tensor:
    return torch.tensor(1.3) if rows.reduce else torch.linspace(0.5, 1.5, len(rows.student))


def moved(rows: LogitRows, device: str) -> LogitRows:
    values = {field.name: getattr(rows, field.name) for field in fields(rows) if field.init}
    return replace(rows, **{k: x.to(device) for k, x in values.items() if isinstance(x, Tensor)})


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def solve(
    impl: str, rows: LogitRows, ids: Tensor, slopes: Tensor, best: Tensor | None = None, then: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """State, events and gradient; the gradient by the implementation `then`, if it is another. The rows are kept."""
    device = device_of(impl)
    rows = moved(replace(rows, student=rows.student.clone() if rows.overwrite else rows.student), device)
    module = _dispatch.pick(OP, impl, rows.student, ())
    state, events = module.gather(rows, ids.to(device), None if best is None else best.to(device))
    assert state.dtype is torch.float64
    slopes, incoming = slopes.to(device, events.dtype), upstream(rows).to(device, events.dtype)
    if then is not None:
        module, rows = _dispatch.pick(OP, then, rows.student, ()), replace(rows)
    grad = module.scatter(rows, ids.to(device), state, events, slopes, SCALE.to(device), incoming)
    assert (grad.shape, grad.dtype) == (rows.student.shape, rows.student.dtype)
    assert (grad is rows.student) == rows.overwrite
    return state.cpu(), events.cpu(), grad.cpu()
