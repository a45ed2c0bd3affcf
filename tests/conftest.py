"""What every test runs under: interpreted Triton where there is no GPU, poisoned memory, seeds."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `bench`; last, so that an installed fastkd wins

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are decorated

import pytest
from cuda_emulation import Machine, build

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a worker per core is what makes the suite quick


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN (or the largest integer), so that an output nobody wrote cannot pass."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta:
                return tensor
            if tensor.dtype is not torch.bool:
                floating = tensor.is_floating_point()
                tensor.detach().fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)
            return tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """csrc/cuda, compiled by gcc for a machine without a GPU."""
    return Machine(build(tmp_path_factory.mktemp("cuda")))


def implementations(names: Sequence[str]) -> list[Any]:
    """All of them, so that an absent one is a skip with its reason and not a test that was never there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    no_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
    no_cpu = pytest.mark.skipif(device != "cpu", reason="the C++ kernels run on the CPU")
    marks = {"native": [pytest.mark.native, no_cpu], "triton": [no_triton]}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module may name the implementations that its family has."""
    if "impl" in metafunc.fixturenames:
        names = getattr(metafunc.module, "IMPLEMENTATIONS", ("reference", "native", "triton"))
        metafunc.parametrize("impl", implementations(names))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted kernels are slow: of the cases that say ``few_interpreted(n)`` they take every n-th.

    A mark of a test counts the cases of that test, a mark of a file (``pytestmark``) those of the whole file.
    """
    if torch.cuda.is_available():
        return
    seen: dict[tuple[Path, str], int] = {}
    for item in items:
        marker = item.get_closest_marker("few_interpreted")
        if marker is None or not isinstance(item, pytest.Function) or not _is_triton(item):
            continue
        (n,) = marker.args
        counted = item.path, item.originalname if marker in item.own_markers else ""
        seen[counted] = seen.get(counted, -1) + 1
        if seen[counted] % n:
            item.add_marker(pytest.mark.skip(reason=f"interpreted: one case in {n}"))


def _is_triton(item: pytest.Function) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("impl") == "triton"
