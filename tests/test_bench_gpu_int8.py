"""``bench/gpu_int8_checks.py``: right kernels pass, wrong ones do not. Here with whatever computes it on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_int8_checks as int8
from bench.gate import Wrong

Layer = Callable[..., Tensor]


def right(layer: Layer) -> Layer:
    return layer


def off(layer: Layer) -> Layer:
    """By one number of one column."""

    def wrong(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        output = layer(x, *arguments, **options)
        output[0, -1] += 1e-2 + output[0, -1].abs() / 64
        return output

    return wrong


def another_number_every_time(layer: Layer) -> Layer:
    return lambda *arguments, **options: layer(*arguments, **options) * torch.rand(())


def never_nan(layer: Layer) -> Layer:
    return lambda *arguments, **options: layer(*arguments, **options).nan_to_num()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(dtype: torch.dtype) -> None:
    int8.numbers("cpu", dtype, right)
    with pytest.raises(Wrong, match=r"^\(1, 1, 1\), none: 1 of 1 numbers are not the reference's$"):
        int8.numbers("cpu", dtype, off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype: torch.dtype) -> None:
    int8.activations("cpu", dtype, right)
    with pytest.raises(Wrong, match=r"^none: off by \d+\.\d times what is allowed$"):
        int8.activations("cpu", dtype, off)


def test_long_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "LONG", 1 << 10)
    int8.long_sums("cpu", right)
    with pytest.raises(Wrong, match=r"^1 rows of 1024: the sums are not exact$"):
        int8.long_sums("cpu", off)


def test_not_finite() -> None:
    int8.not_finite("cpu", right)
    with pytest.raises(Wrong, match=r"^3 rows, nan: that row, and no other, must be NaN$"):
        int8.not_finite("cpu", never_nan)


def test_same_bits() -> None:
    int8.same_bits("cpu", right)
    with pytest.raises(Wrong, match=r"^\(4, 500, 300\): the numbers differ from call to call$"):
        int8.same_bits("cpu", another_number_every_time)


def test_the_list() -> None:
    assert list(int8.checks("cuda", (torch.bfloat16,))) == [
        "int8 bfloat16",
        "int8 activations bfloat16",
        "int8 long sums",
        "int8 not finite",
        "int8 same bits",
        "int8 no waiting",
        "int8 cuda graph",
        "int8 another stream",
        "int8 another device",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_they_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert int8.main() == int8.CANNOT_RUN
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", int8.checks("cuda", int8.DTYPES))
def test_on_gpu(name: str) -> None:
    int8.checks("cuda", int8.DTYPES)[name]()
