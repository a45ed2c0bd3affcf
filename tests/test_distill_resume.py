"""A run that was killed goes on to the same weights, the same metrics and the same files, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import run_cases

# All cases run in one process and its forks, so one worker has to have them all.
pytestmark = pytest.mark.xdist_group("distill_resume")

CASES = [
    ("worker", "kill_after_steps", 7),  # first, as the worker lives on for seconds
    ("plain", "kill_after_steps", 7),
    ("plain", "kill_within_checkpoint", 1),
    ("plain", "kill_within_checkpoint", 4),
    ("plain", "kill_before_rename", 2),
    ("plain", "kill_after_rename", 2),
    ("plain", "kill_before_best", 1),
    ("plain", "kill_before_best", 2),
    *(("plain", "kill_within_metrics", times) for times in (1, 2, 3, 12, 26, 27, 28, 29)),
    ("saving every step", "kill_after_steps", 2),
    ("accumulated", "kill_after_steps", 4),
    ("bfloat16", "kill_after_steps", 8),
    ("float16", "kill_after_steps", 8),
    ("loader", "kill_after_steps", 7),
    ("loader with generator", "kill_after_steps", 7),
    ("plateau", "kill_after_steps", 11),
    ("plateau", "kill_before_best", 2),
    *(("stages", "kill_after_steps", times) for times in (3, 5, 8)),
    *(("chain", "kill_after_steps", times) for times in (3, 5, 8)),
    ("group", "kill_after_steps", 3),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict[str, Any]]:
    found, stderr = run_cases("distill_runs.py", tmp_path_factory.mktemp("runs"), CASES)
    for one in found:
        one["stderr"] = stderr[-2000:]
    return {tuple(one["case"]): one for one in found}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_a_killed_run_ends_as_one_that_was_not(
    case: tuple[str, str, int], results: dict[tuple[str, str, int], dict[str, Any]]
) -> None:
    result = results[case]
    *killed, last = result["statuses"]
    assert killed, "it was never killed"
    assert set(killed) == {-signal.SIGKILL}
    assert last == 0, result["stderr"]
    ended, whole = (json.loads(Path(result[which]).with_suffix(".json").read_text()) for which in ("out", "whole"))
    assert ended["weights"] == whole["weights"]
    assert ended["files"].keys() == whole["files"].keys(), "nothing unfinished is left, and nothing is missing"
    for name, content in whole["files"].items():
        assert ended["files"][name] == content, name
