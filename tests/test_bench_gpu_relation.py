"""``bench/gpu_relation_checks.py``: right kernels pass, wrong ones do not. Here with whatever computes it on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_relation_checks as relation
from bench.gate import Wrong

Loss = Callable[..., Tensor]


def right(loss: Loss) -> Loss:
    return loss


def loss_off(loss: Loss) -> Loss:
    def wrong(*arguments: Any) -> Tensor:
        value = loss(*arguments)
        return value + 1e-3 * value.detach()

    return wrong


def gradient_off(loss: Loss) -> Loss:
    def wrong(*arguments: Any) -> Tensor:
        value = loss(*arguments)
        return value + 1e-3 * (value - value.detach())

    return wrong


def not_a_number(loss: Loss) -> Loss:
    return lambda *arguments: loss(*arguments) * torch.nan


def another_number_every_time(loss: Loss) -> Loss:
    return lambda *arguments: loss(*arguments) * (1 + 1e-3 * torch.rand(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(relation.SIZES, "cpu", ((1, 3), (33, 7)))
    relation.numbers("cpu", dtype, right)
    with pytest.raises(Wrong, match=r"^distance, 33 rows: the loss is off by \d+\.\d times what is allowed$"):
        relation.numbers("cpu", dtype, loss_off)
    with pytest.raises(Wrong, match=r"^distance, 1 rows: the loss is off by inf times what is allowed$"):
        relation.numbers("cpu", dtype, not_a_number)


def test_gradients_of_few_rows_and_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(relation.SIZES, "cpu", ((20, 7),))
    with pytest.raises(Wrong, match=r"^distance, 20 rows: the gradient is off by"):
        relation.numbers("cpu", torch.float32, gradient_off)
    monkeypatch.setattr(relation, "FEW", 10)
    relation.numbers("cpu", torch.float32, right)
    with pytest.raises(Wrong, match=r"^distance, 20 rows: the gradient is off by"):
        relation.numbers("cpu", torch.float32, gradient_off)


def test_same_bits() -> None:
    relation.same_bits("cpu", right)
    with pytest.raises(Wrong, match=r"^distance, 33 rows: the numbers differ from call to call$"):
        relation.same_bits("cpu", another_number_every_time)


def test_equal_models() -> None:
    relation.equal_models("cpu", lambda loss: relation._pinned(loss, "reference"))
    with pytest.raises(Wrong, match=r"^distance: the loss of equal models must be 0, got up to 1\.0e\+00$"):
        relation.equal_models("cpu", lambda loss: lambda *arguments: loss(*arguments, impl="reference") + 1)


def test_the_list() -> None:
    assert list(relation.checks("cuda", (torch.float32, torch.bfloat16))) == [
        "relations float32",
        "relations bfloat16",
        "relations same bits",
        "relations equal models",
        "relations no waiting",
        "relations cuda graph",
        "relations another stream",
        "relations another device",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_they_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert relation.main() == relation.CANNOT_RUN
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", relation.checks("cuda", relation.DTYPES))
def test_on_gpu(name: str) -> None:
    relation.checks("cuda", relation.DTYPES)[name]()
