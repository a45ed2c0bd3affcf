"""The bench of losses on the relations of a batch: all compute the same, and a wrong number is not timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import record, relation, run
from bench.measure import Contender
from bench.providers import able

TINY = ["relation", "--device", "cpu", "--threads", "1", "--repeat", "2", "--commit", "abc1234", "--rows", "12"]
TINY += ["--width", "6"]
WITHOUT_COMPILER = ["eager", "fastkd", "fastkd-prepared"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_a_row_for_everyone(tmp_path: Path) -> None:
    losses = ["rkd-distance", "nst"]  # of rows and of maps; all are checked below
    assert run.main([*TINY, "--loss", *losses, "--providers", *WITHOUT_COMPILER, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("relation-*.csv")
    rows = record.read(path)
    assert [row["provider"] for row in rows] == WITHOUT_COMPILER * len(losses)
    assert list(dict.fromkeys(row["loss"] for row in rows)) == losses
    assert all(float(row["wall_ms"]) > 0 and row["rows"] == "12" and row["width"] == "6" for row in rows)


@pytest.mark.parametrize("name", relation.RELATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_compute_the_same(name: str, dtype: torch.dtype) -> None:
    problem = relation.Problem(name, 30, 9, 7, dtype, torch.device("cpu"), None)
    assert problem.exact[1].abs().max() > 1e-6
    for mode in relation.MODES:
        for who in WITHOUT_COMPILER:
            problem.check(relation._contender(who, problem, mode))


@pytest.mark.parametrize("who", relation.RIVALS)
@pytest.mark.parametrize("name", ["rkd-distance", "cka"])
def test_another_library_computes_the_same_or_says_why_not(who: str, name: str) -> None:
    problem = relation.Problem(name, 12, 6, 6, torch.float32, torch.device("cpu"), None)
    contenders, absent = able([who], lambda rival: relation._contender(rival, problem, "forward"), problem.check)
    if importlib.util.find_spec(who) is None:
        assert absent == {who: f"{who} is not installed"}
    elif name == "cka":
        assert not contenders
        assert who in absent[who]
    else:
        assert [contender.name for contender in contenders] == [who]


@pytest.mark.parametrize("number", ["loss", "gradient"])
@pytest.mark.parametrize("who", WITHOUT_COMPILER)
def test_a_wrong_number_is_not_timed(
    who: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = relation._contender

    def off_by_a_hair(name: str, *arguments: object) -> Contender:
        contender = right(name, *arguments)

        def wrong() -> tuple[torch.Tensor, ...]:
            loss, grad = contender.run()
            return (loss * 1.001, grad) if number == "loss" else (loss, grad * 1.001)

        return Contender(name, wrong, contender.prepare, contender.impl) if name == who else contender

    monkeypatch.setattr(relation, "_contender", off_by_a_hair)
    words = [*TINY, "--loss", "rkd-angle", "--providers", *WITHOUT_COMPILER, "--out", str(tmp_path)]
    assert run.main(words) == 1
    assert f"{who}: {number}" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_what_differs_from_the_published_formula_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of fastkd agrees with itself."""
    entry = relation.RELATIONS["rkd-distance"]

    def ours(student: torch.Tensor, teacher: torch.Tensor, **options: object) -> torch.Tensor:
        return entry.ours(student, teacher, **options) * (1 + 1e-4)

    ours.__name__ = entry.ours.__name__
    monkeypatch.setitem(relation.RELATIONS, "rkd-distance", entry._replace(ours=ours))
    problem = relation.Problem("rkd-distance", 30, 9, 7, torch.float32, torch.device("cpu"), None)
    with pytest.raises(relation.Wrong):
        relation._contender("fastkd", problem, "forward+backward")
