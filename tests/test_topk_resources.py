"""What the compiler makes of the Triton kernels for sparse teachers, read as in test_triton_resources.py."""

from __future__ import annotations

import collections
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from test_triton_resources import NoDevice, _compile_instead_of_launching, _report, _run

CALLS: dict[str, dict[str, Any]] = {
    "soft": {"label": False},
    "hard": {},
    "hard T=1": {"temperature": 1.0},
    "by row": {"temperature": "row", "alpha": "row", "row_weight": "row"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "fewer shared": {"shared": 50000, "label_smoothing": 0.1, "agreement": True},
    "in place": {"overwrite": True},
    "in parts": {"parts": 3},
    "short rows": {"vocabulary": 1000},
    "many ids": {"k": 3000},
}
COMPILED = [(90, call) for call in CALLS] + [(arch, "hard") for arch in (80, 100)]
# Instructions and slow ones per id: those of a hard term's exponential, and of a temperature's, are among them.
LIMITS = {"tail_statistics": (20.0, 2.2), "spread_gradient": (20.0, 2.1)}

pytestmark = pytest.mark.xdist_group("topk resources")  # compiled once, by one worker


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    pytest.importorskip("triton")
    return _run("report", [list(case) for case in COMPILED], __file__)


def _ids(case: tuple[int, str]) -> str:
    return f"sm_{case[0]} {case[1]}"


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_nothing_spills(case: tuple[int, str], reports: dict[str, Any]) -> None:
    assert len(reports[_ids(case)]) == 6
    for kernel in reports[_ids(case)]:
        assert (kernel["stack"], kernel["local"], kernel["spills"]) == (0, 0, 0), kernel["name"]


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_the_body_reads_16_bytes_of_logits_and_a_byte_of_marks_at_a_time(
    case: tuple[int, str], reports: dict[str, Any]
) -> None:
    streaming = [kernel for kernel in reports[_ids(case)] if kernel["name"] in LIMITS]
    assert len(streaming) == 2
    for kernel in streaming:
        body, U = kernel["body"], kernel["U"]
        marks = {"U8": U} if kernel["name"] == "tail_statistics" else {}
        assert body["loads"] == {"128": U} | marks, (kernel["name"], body["loads"])
        assert set(body["stores"]) <= {"128"}, (kernel["name"], body["stores"])
        assert kernel["narrow_loads"] <= 2, kernel["name"]


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_the_body_stays_within_a_thread_and_below_the_issue_limits(
    case: tuple[int, str], reports: dict[str, Any]
) -> None:
    for kernel in reports[_ids(case)]:
        if kernel["name"] not in LIMITS:
            continue
        body, ids = kernel["body"], kernel["K"] * kernel["U"]
        assert body["across_threads"] == 0, (kernel["name"], body)
        instructions, slow = LIMITS[kernel["name"]]
        if "agreement" not in CALLS[case[1]]:
            assert body["instructions"] / ids <= instructions, (kernel["name"], body["instructions"] / ids)
        assert body["slow"] / ids <= slow, (kernel["name"], body["slow"] / ids)


def test_one_binary_serves_every_batch_vocabulary_and_number_of_ids() -> None:
    pytest.importorskip("triton")
    calls = [
        {"rows": 3, "vocabulary": 50257, "k": 128},
        {"rows": 1, "vocabulary": 50257, "k": 1},
        {"rows": 4096, "vocabulary": 50304, "k": 16},
        {"rows": 2, "vocabulary": 128256, "k": 1000},
        {"rows": 2, "vocabulary": 50257, "k": 127, "stride": 50304},
        {"rows": 2, "vocabulary": 50257, "k": 50, "offset": 3},
        {"rows": 2, "vocabulary": 50264, "k": 128, "temperature": 3.0, "alpha": 1.0 / 3, "z_loss": 1e-4, "parts": 4},
    ]
    names = ("mark_named", "tail_statistics", "gather_events", "named_gradients", "spread_gradient", "place_named")
    assert _run("count", calls, __file__) == dict.fromkeys(names, 1)


def _call(
    rows: int = 3, vocabulary: int = 50257, k: int = 128, dtype: str = "bfloat16", label: bool = True, parts: int = 1,
    stride: int | None = None, offset: int = 0, **changed: Any,
) -> None:  # fmt: skip
    """Gather and scatter of a problem whose numbers do not matter."""
    import torch
    from fastkd_kernels import logit, topk
    from topk_problems import problem

    stride = stride or vocabulary
    memory = torch.empty(rows * stride + offset, dtype=getattr(torch, dtype))
    asked = problem(memory.as_strided((rows, vocabulary), (stride, 1), offset))
    if not label:
        asked = replace(asked, target=None, alpha=0.0)
    numbers = {name: torch.ones(rows) if value == "row" else value for name, value in changed.items()}
    asked = replace(asked, **{"temperature": 2.0} | numbers)
    logit._parts = lambda *_: parts
    indices = torch.zeros(rows, k, dtype=torch.int64)
    best = torch.zeros(rows, dtype=torch.int64)
    state, events = topk.gather(asked, indices, best if asked.agreement else None)
    upstream = torch.ones(()) if asked.reduce else torch.ones(rows)
    topk.scatter(asked, indices, state, events, torch.ones(rows, k + 1), torch.ones((), dtype=torch.float64), upstream)


def _main(task: str, argument: Any) -> object:
    from triton.runtime.driver import driver

    driver.set_active(NoDevice(90))
    compiled = _compile_instead_of_launching()
    if task == "report":
        reports = {}
        for architecture, name in argument:
            driver.set_active(NoDevice(architecture))
            compiled.clear()
            _call(**CALLS[name])
            reports[_ids((architecture, name))] = _report(compiled)
        return reports
    kernels: dict[str, set[int]] = collections.defaultdict(set)
    for call in argument:
        _call(**call)
    for name, kernel, _ in compiled:
        kernels[name].add(id(kernel))
    return {name: len(binaries) for name, binaries in kernels.items()}


if __name__ == "__main__":
    json.dump(_main(sys.argv[1], json.loads(sys.argv[2])), sys.stdout)
