"""The matrix products of which the device alone knows how many rows count, called directly.

With a GPU they run on it, in tiles of every kind; else in Triton's interpreter, in small ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastkd.testing import assert_as_exact_as_fp32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1", allow_module_level=True)

from fastkd_kernels import matmul  # noqa: E402

NAN = float("nan")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
# Rows, vocabulary, hidden size. A small tile is 16 x 16 x 16: one, parts of one, whole ones and a rest.
SIZES = [(16, 16, 16), (5, 37, 19), (19, 32, 40), (3, 1, 1), (1, 50, 33)]
if DEVICE == "cuda":  # tiles of 128 x 256 where there are many of them, of 128 x 128 where not, odd and even rows
    SIZES += [(700, 16384, 512), (700, 16385, 520), (300, 2056, 200), (513, 50257, 129)]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def counts(rows: int) -> list[int]:
    if rows > 100:
        return [1, rows // 2 | 1]
    return sorted({0, 1, rows // 2 | 1, rows} & set(range(rows + 1)))


def number(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(count, dtype=dtype, device=DEVICE)


def check_logits(x: Tensor, w: Tensor, bias: Tensor | None, count: int, scale: float = 0.5) -> None:
    """``x``: NaN from the count on."""
    out = torch.full((len(x), len(w)), 7.0, device=DEVICE)
    matmul.multiply(x, w.t(), number(count), out, bias=bias, scale=scale)
    assert bool((out[count:] == 7).all())

    def compute(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
        return scale * (x @ w.t() + (bias[0] if bias else 0))

    assert_as_exact_as_fp32(out[:count], compute, x[:count], w, *([] if bias is None else [bias]))


def check_gradients(g: Tensor, w: Tensor, x: Tensor, count: int, scale: float = -2.0) -> None:
    of_input = torch.zeros(len(g), w.shape[1], device=DEVICE)
    matmul.multiply(g, w, number(count, torch.int32), of_input, scale=scale)
    assert not of_input[count:].any()
    assert_as_exact_as_fp32(of_input[:count], lambda g, w: scale * (g @ w), g[:count], w)

    before = randn(g.shape[1], x.shape[1], dtype=torch.float32, seed=9)
    of_weight = before.clone()
    matmul.add_outer(of_weight, g, x, number(count), scale=scale)
    assert_as_exact_as_fp32(of_weight, lambda t, g, x: t + scale * (g.t() @ x), before, g[:count], x[:count])
    if not count:
        assert torch.equal(of_weight, before)


def dropped(x: Tensor, count: int) -> Tensor:
    x = x.clone()
    x[count:] = NAN
    return x


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The three products of a head, for no row, one, an odd number of them and all; NaN in those that do not count."""
    rows, vocabulary, hidden = size
    x, w = randn(rows, hidden, dtype=dtype, seed=1), randn(vocabulary, hidden, dtype=dtype, seed=2)
    g, bias = randn(rows, vocabulary, dtype=dtype, seed=3), randn(vocabulary, dtype=dtype, seed=4)
    for count in counts(rows):
        check_logits(dropped(x, count), w, bias if count % 2 else None, count)
        check_gradients(dropped(g, count), w, dropped(x, count), count)


def inside(x: Tensor, stride: int, offset: int) -> Tensor:
    """x in a buffer of NaN: rows ``stride`` apart, the first one ``offset`` elements in."""
    buffer = torch.full((offset + len(x) * stride + 16,), NAN, dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, (stride, 1), offset).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "aligned rows": lambda x: inside(x, x.shape[1] + 8 - x.shape[1] % 8, 8),
    "odd rows": lambda x: inside(x, x.shape[1] + 3 - x.shape[1] % 2, 0),
    "odd beginning": lambda x: inside(x, x.shape[1] + 8 - x.shape[1] % 8, 3),
    "transposed": lambda x: inside(x.t(), len(x) + 8 - len(x) % 8, 0).t(),
    "transposed, odd": lambda x: inside(x.t(), len(x) + 1, 1).t(),
    "every other column": lambda x: inside(x.repeat_interleave(2, 1), 2 * x.shape[1], 0)[:, ::2],
}


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Nothing around an operand is used, whichever way it is read."""
    rows, vocabulary, hidden = (300, 2051, 203) if DEVICE == "cuda" else (19, 35, 21)
    lay, count = LAYOUTS[layout], rows - 2
    x, w = randn(rows, hidden, dtype=dtype, seed=1), randn(vocabulary, hidden, dtype=dtype, seed=2)
    g, bias = randn(rows, vocabulary, dtype=dtype, seed=3), randn(2 * vocabulary, dtype=dtype, seed=4)[::2]
    check_logits(lay(dropped(x, count)), lay(w), bias, count)
    check_gradients(lay(dropped(g, count)), lay(w), lay(dropped(x, count)), count)


def test_expanded_operands() -> None:
    w = randn(35, 20, dtype=torch.float32, seed=2)
    x, g = (randn(size, dtype=torch.float32, seed=1).expand(18, size) for size in (20, 35))
    check_logits(x, w, None, 17)
    check_gradients(g, w, x, 17)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)], ids=str)
def test_operands_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Neither is rounded to the other's."""
    for one, other in (dtypes, dtypes[::-1]):
        x, w = randn(18, 24, dtype=one, seed=1), randn(35, 24, dtype=other, seed=2)
        check_logits(x, w, randn(35, dtype=torch.float16, seed=3), 17)
        check_gradients(randn(18, 35, dtype=one, seed=4), w, randn(18, 24, dtype=other, seed=5), 17)


def test_nothing_beside_the_result_is_written() -> None:
    x, w = randn(18, 24, dtype=torch.float32, seed=1), randn(35, 24, dtype=torch.float32, seed=2)
    for columns in (35, 36, 41):
        memory = torch.full((18, columns), 7.0, device=DEVICE)
        matmul.multiply(x, w.t(), number(17), memory[:, :35])
        torch.testing.assert_close(memory[:17, :35], x[:17] @ w.t(), rtol=1e-4, atol=1e-5)
        memory[:17, :35] = 7
        assert bool((memory == 7).all())


def test_a_sum_over_nothing() -> None:
    x, w, bias = torch.zeros(3, 0, device=DEVICE), torch.zeros(5, 0, device=DEVICE), torch.ones(5, device=DEVICE)
    out = torch.full((3, 5), 7.0, device=DEVICE)
    matmul.multiply(x, w.t(), number(2), out, bias=bias, scale=3.0)
    assert out.tolist() == [[3.0] * 5] * 2 + [[7.0] * 5]
    total = torch.ones(5, 4, device=DEVICE)
    matmul.add_outer(total, out[:0], torch.zeros(0, 4, device=DEVICE), number(0))
    matmul.multiply(torch.zeros(0, 4, device=DEVICE), total.t(), number(0), out[:0])
    assert bool((total == 1).all())


def test_a_count_out_of_bounds_stays_within_the_rows() -> None:
    x, w = randn(3, 4, dtype=torch.float32, seed=1), randn(5, 4, dtype=torch.float32, seed=2)
    for count, computed in ((1000, 3), (-5, 0)):
        memory = torch.full((6, 5), 7.0, device=DEVICE)
        matmul.multiply(x, w.t(), number(count), memory[:3])
        assert bool((memory[:computed] != 7).all())
        assert bool((memory[computed:] == 7).all())


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    g, x = randn(40, 50, dtype=dtype, seed=1), randn(40, 24, dtype=dtype, seed=2)
    totals = [torch.ones(50, 24, device=DEVICE) for _ in range(2)]
    for total in totals:
        matmul.add_outer(total, g, x, number(39))
    assert torch.equal(*totals)


def test_every_tile_has_one_place() -> None:
    """Any grid of tiles is gone through once, whatever is left of the last group of rows."""
    for rows, columns in ((1, 1), (3, 5), (18, 3)):
        x, w = randn(16 * rows, 8, dtype=torch.float32, seed=1), randn(16 * columns, 8, dtype=torch.float32, seed=2)
        out = torch.full((len(x), len(w)), NAN, device=DEVICE)
        matmul.multiply(x, w.t(), number(len(x)), out)
        torch.testing.assert_close(out, x @ w.t(), rtol=1e-4, atol=1e-5)
