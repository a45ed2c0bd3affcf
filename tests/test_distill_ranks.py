"""A run over two processes of which one or both were killed goes on as one that was not, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from distill_ranks import RANKS
from processes import run_cases

# All cases run in one process and its forks, so one worker has to have them all.
pytestmark = pytest.mark.xdist_group("distill_ranks")

Case = tuple[list[int], str, int]
CASES: list[Case] = [
    ([0, 1], "kill_after_steps", 7),  # of 5 in an epoch
    ([0], "kill_after_steps", 4),
    ([1], "kill_after_steps", 4),
    ([0], "kill_within_checkpoint", 1),
    ([0], "kill_within_checkpoint", 4),
    ([0], "kill_before_best", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> tuple[list[dict[str, Any]], str]:
    return run_cases("distill_ranks.py", folder, CASES)


def left(folder: Path, run: str | int, rank: int) -> Any:
    """What a rank had at the end."""
    return json.loads((folder / f"{run}.{rank}.json").read_text())


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])))
def test_a_killed_run_ends_as_one_that_was_not(
    number: int, results: tuple[list[dict[str, Any]], str], folder: Path
) -> None:
    killed, (result, stderr) = CASES[number][0], (results[0][number], results[1])
    first, second = result["statuses"]
    assert first == [-signal.SIGKILL if rank in killed else 1 for rank in range(RANKS)], "the other one ends, too"
    assert second == [0] * RANKS, stderr[-2000:]
    for rank in range(RANKS):
        ended, whole = (left(folder, name, rank) for name in (number, "whole"))
        assert ended["weights"] == whole["weights"]
        assert ended["files"].keys() == whole["files"].keys(), "nothing unfinished is left, and nothing is missing"
        for name, content in whole["files"].items():
            assert ended["files"][name] == content, name


@pytest.mark.parametrize("run", ["whole", 0])
def test_all_ranks_end_with_the_same_student(run: str | int, results: Any, folder: Path) -> None:
    """Statistics of BatchNorm, too."""
    first, second = (left(folder, run, rank)["weights"] for rank in range(RANKS))
    assert first == second


def test_all_ranks_are_told_that_another_run_is_going_on(results: tuple[list[dict[str, Any]], str]) -> None:
    assert results[1].count("ValueError: fit: out must be a folder in which no run is going on") == RANKS
