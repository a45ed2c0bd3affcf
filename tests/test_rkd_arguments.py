"""What rkd_distance_loss and rkd_angle_loss refuse, and how they say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd

ARGUMENTS = [
    (TypeError, "student must be a tensor, got list", {"student": [[1.0]]}),
    (
        TypeError,
        "student must be float16, bfloat16, float32 or float64, got torch.int64",
        {"student": torch.ones(4, 3).long()},
    ),
    (TypeError, "teacher must be a tensor, got NoneType", {"teacher": None}),
    (ValueError, "student must have the shape (N, D), got (4,)", {"student": torch.ones(4)}),
    (ValueError, "teacher must have the shape (N, D), got (1, 4, 2)", {"teacher": torch.ones(1, 4, 2)}),
    (ValueError, "teacher must have as many rows as the student, 4, got 5", {"teacher": torch.ones(5, 2)}),
    (
        ValueError,
        "teacher must be on the student's device, cpu, got meta",
        {"teacher": torch.ones(4, 2, device="meta")},
    ),
    (TypeError, "delta must be a number, got str", {"delta": "1"}),
    (ValueError, "delta must be positive and finite in float32, got 0.0", {"delta": 0}),
    (ValueError, "delta must be positive and finite in float32, got inf", {"delta": float("inf")}),
    (ValueError, "delta must be positive and finite in float32, got nan", {"delta": float("nan")}),
    (TypeError, "normalize_rows must be a bool, got int", {"normalize_rows": 1}),
    (ValueError, "reduction must be one of mean, sum, got 'none'", {"reduction": "none"}),
    (ValueError, "impl must be one of native, algebra, reference, got 'fast'", {"impl": "fast"}),
]


@pytest.mark.parametrize("loss", [fastkd.rkd_distance_loss, fastkd.rkd_angle_loss])
@pytest.mark.parametrize(("error", "message", "arguments"), ARGUMENTS, ids=[case[1] for case in ARGUMENTS])
def test_arguments(
    loss: Callable[..., Tensor], error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error) as raised:
        loss(**{"student": torch.ones(4, 3), "teacher": torch.ones(4, 2), **arguments})
    assert str(raised.value) == f"{loss.__name__}: {message}"


def test_a_teacher_that_changed_is_refused() -> None:
    teacher = torch.randn(4, 3)
    taught = fastkd.prepare_teacher(teacher)
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        fastkd.rkd_angle_loss(torch.randn(4, 3), taught)


@pytest.mark.native
def test_float64_is_computed_by_algebra(capsys: pytest.CaptureFixture[str]) -> None:
    for op in ("rkd_distance_loss", "rkd_angle_loss", "pairwise_distance"):
        fastkd.explain(op, torch.ones(4, 3, dtype=torch.float64))
        assert "algebra    ok <- runs" in capsys.readouterr().out
        fastkd.explain(op, torch.ones(4, 3))
        assert "native     ok <- runs" in capsys.readouterr().out
