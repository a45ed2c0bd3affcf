"""Numbers over training."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from fastkd.distill import Cosine, Function, Linear, Piecewise, Schedule, Warmup

CASES: dict[Schedule, dict[int, float]] = {
    Linear(4.0, 1.0): {0: 4.0, 10: 3.7, 50: 2.5, 100: 1.0},
    Linear(0.0, 1.0, begin=20, until=0.4): {0: 0.0, 20: 0.0, 30: 0.5, 40: 1.0, 99: 1.0},
    Linear(3.0, 5.0, begin=0.5, until=0.5): {49: 3.0, 50: 5.0},
    Linear(3.0, 5.0, until=0): {0: 5.0},
    Cosine(2.0, 1.0, until=50): {0: 2.0, 25: 1.5, 50: 1.0, 70: 1.0, 10: 1.5 + math.cos(math.pi / 5) / 2},
    Warmup(8.0, until=20): {0: 0.0, 5: 2.0, 20: 8.0, 99: 8.0},
    Warmup(8.0, until=0.2): {5: 2.0},
    Function(math.sqrt): {25: 0.5, 100: 1.0, 400: 1.0},
}


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_values(schedule: Schedule) -> None:
    schedule = pickle.loads(pickle.dumps(schedule))
    for step, value in CASES[schedule].items():
        assert schedule.value(step, 100) == pytest.approx(value, abs=1e-12)


def test_piecewise() -> None:
    schedule = pickle.loads(pickle.dumps(Piecewise({0.5: 0.1, 0: 1.0, 90: 0.01})))
    assert [schedule.value(step, 100) for step in (0, 49, 50, 89, 90, 500)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(math.nan, 1.0), "Linear: start must be finite, got nan"),
        (lambda: Linear(0.0, 1.0, until=1.5), r"Linear: until must be a fraction from 0.0 to 1.0, or a step as an int"),
        (lambda: Cosine(0.0, 1.0, begin=-1), "Cosine: begin must be a fraction"),
        (lambda: Warmup(1.0, until=2.0), "Warmup: until must be a fraction"),
        (lambda: Piecewise({0.5: 1.0}), r"Piecewise: values must begin at 0, got \[0.5\]"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
