"""Who computes a loss: what is said where the C++ kernels cannot, to whom, and when a call raises instead."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastkd
from fastkd import _dispatch, native, reference

CPU, FLOAT = torch.device("cpu"), (torch.float32,)
WRONG = "FASTKD_CPU_ISA=avx1024: this processor does not have it"


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    for cached in (_dispatch._choose, _dispatch._say_once):
        cached.cache_clear()
    yield
    for cached in (_dispatch._choose, _dispatch._say_once):
        cached.cache_clear()


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_reason", "it is gone")


@pytest.fixture
def wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension that refuses its instruction set, as the real one does."""

    def instruction_set() -> str:
        raise RuntimeError(WRONG)

    monkeypatch.setattr(native, "_extension", SimpleNamespace(instruction_set=instruction_set))
    monkeypatch.setattr(native, "_reason", None)


@pytest.mark.parametrize(
    ("platform", "says", "does_not_say"),
    [
        ("linux", "`pip install .` builds it, it needs a C++17 compiler", "Linux"),
        ("darwin", "the C++ kernels are built on Linux alone", "pip install"),
        ("win32", "the C++ kernels are built on Linux alone", "pip install"),
    ],
)
def test_a_missing_extension_gives_advice_that_works_here(
    platform: str, says: str, does_not_say: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "fastkd._C", None)
    extension, reason = native._load()
    assert extension is None
    assert reason is not None
    assert says in reason
    assert does_not_say not in reason


def _call(dtype: torch.dtype = torch.float32) -> None:
    fastkd.kd_loss(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype))


def _call_module() -> None:
    fastkd.KDLoss(temperature=2.0)(torch.zeros(2, 3), torch.zeros(2, 3))


def _call_within_a_module() -> None:
    torch.nn.Sequential(OneArgument())(torch.zeros(2, 3))


class OneArgument(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return fastkd.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "line_of"), [(_call, _call), (_call_module, _call_module), (_call_within_a_module, OneArgument.forward)]
)
def test_the_warning_names_the_line_of_the_call(
    call: Callable[[], None], line_of: Callable[..., object], without_extension: None
) -> None:
    with pytest.warns(RuntimeWarning, match="^fastkd runs on eager PyTorch here, slowly: it is gone$") as said:
        call()
    (one,) = said
    assert one.filename == __file__
    assert one.lineno == inspect.getsourcelines(line_of)[1] + 1


def test_the_warning_comes_once(without_extension: None) -> None:
    with pytest.warns(RuntimeWarning, match="slowly"):
        _call()
    _call(torch.bfloat16)  # a warning is an error here
    _call_within_a_module()


def test_no_warning_of_what_the_extension_would_not_compute_either(without_extension: None) -> None:
    _call(torch.float64)


def test_a_wrong_setting_raises_and_nobody_stands_in(wrong_setting: None) -> None:
    for _ in range(2):  # the refusal is not remembered as a choice
        with pytest.raises(RuntimeError, match=f"^kd_loss: {WRONG}$"):
            _call()
    with pytest.raises(RuntimeError, match=f"^kd_loss: impl='native' cannot run here: {WRONG}; what can: "):
        fastkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), impl="native")
    fastkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), impl="reference")
    _call(torch.float64)  # which the reference computes whatever the setting


def test_explain_says_that_a_wrong_setting_raises(wrong_setting: None, capsys: pytest.CaptureFixture[str]) -> None:
    fastkd.explain("kd_loss", torch.zeros(2, 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"  native     {WRONG} <- raises"
    assert lines[-1] == "  reference  ok"


def test_a_family_without_kernels_runs_on_its_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foo.py").touch()
    monkeypatch.setattr(reference, "__path__", [*reference.__path__, str(tmp_path)])
    monkeypatch.setitem(_dispatch.OPERATIONS, "foo_loss", "foo")
    assert _dispatch.pick("foo_loss", None, torch.zeros(2), []).__name__ == "fastkd.reference.foo"
    with pytest.raises(RuntimeError, match=r"there is no fastkd\.native\.foo; what can: reference$"):
        _dispatch.pick("foo_loss", "native", torch.zeros(2), [])
    fastkd.explain("foo_loss", torch.zeros(2))
    assert "reference  ok <- runs" in capsys.readouterr().out


def test_without_the_package_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch.PACKAGES, "triton", "no_such_package")
    assert _dispatch._refusal("kd_loss", "triton", CPU, FLOAT) == "No module named 'no_such_package'"
    _call(torch.float64)
