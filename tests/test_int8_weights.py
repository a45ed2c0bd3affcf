"""Layers whose weights alone are int8: tables, and linear layers of float input."""

from __future__ import annotations

import random

import pytest
import torch
from int8_problems import ACTIVATIONS, DTYPES, flat, int8, scales, weights

from fastkd.testing import assert_as_exact_as_fp32

IMPLEMENTATIONS = ("reference", "native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (0, 4)])
@pytest.mark.parametrize("columns", [0, 1, 15, 16, 17, 100])
def test_rows_of_a_table(impl: str, columns: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w, scale = weights(9, columns), scales(9)
    ids = torch.randint(9, shape)
    got = int8.embedding(ids, w, scale, dtype=dtype, impl=impl)
    assert got.dtype is dtype
    assert torch.equal(got, (w[ids].float() * scale[ids].unsqueeze(-1)).to(dtype))


@pytest.mark.parametrize("ids", [torch.int32, torch.uint8, torch.int64])
def test_ids_of_any_integer_type_and_stride(impl: str, ids: torch.dtype) -> None:
    w, scale, some = weights(9, 20), scales(9), torch.arange(9).repeat(2).view(2, 9).T.to(ids)
    want = int8.embedding(some.long().contiguous(), w, scale, impl="reference")
    assert torch.equal(int8.embedding(some, w, scale, impl=impl), want)
    assert torch.equal(int8.embedding(some, w.T.contiguous().T, scale.half().float(), impl=impl),
                       int8.embedding(some, w, scale.half(), impl=impl))  # fmt: skip


def test_float64_tables() -> None:
    w, scale = weights(9, 20), scales(9).double() / 3
    got = int8.embedding(torch.arange(9), w, scale, dtype=torch.float64)
    assert torch.equal(got, w.double() * scale.unsqueeze(1))


@pytest.mark.parametrize("wrong", [-1, 9, 2**40, -(2**63)])
def test_ids_out_of_range(impl: str, wrong: int) -> None:
    ids = torch.tensor([3, wrong, 70])
    with pytest.raises(ValueError, match=f"^int8_embedding: input must hold ids from 0 to 8, got {wrong}$"):
        int8.embedding(ids, weights(9, 20), scales(9), impl=impl)


@pytest.mark.native
def test_threads_change_no_bit_of_a_table() -> None:
    w, scale, ids = weights(50, 300), scales(50), torch.randint(50, (1000,))
    want = int8.embedding(ids, w, scale, impl="reference")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(int8.embedding(ids, w, scale, impl="native"), want)


@pytest.mark.parametrize("seed", range(30))
def test_linear_layers_are_as_exact_as_float32(impl: str, seed: int) -> None:
    dice = random.Random(seed)
    rows, terms, columns = (
        dice.choice([1, 3, 8, 9, 65]),
        dice.choice([1, 3, 4, 5, 66, 130]),
        dice.choice([1, 16, 33, 97]),
    )
    dtype, activation = dice.choice(DTYPES), dice.choice(["none", "relu", "silu"])
    x = flat(rows, terms + 3, seed=seed, dtype=dtype)[:, :terms]
    w, scale, bias = weights(columns, terms, seed=seed), scales(columns, seed) * 0.1, flat(columns, seed=1)
    residual = (
        flat(rows, columns, seed=2, dtype=dtype) if dice.random() < 0.5 else torch.zeros(rows, columns, dtype=dtype)
    )
    got = int8.weight_only_linear(x, w, scale, bias, activation=activation, residual=residual, impl=impl)
    assert got.dtype is dtype

    def formula(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[activation]((x @ w.to(x.dtype).T) * scale + bias + residual)

    assert_as_exact_as_fp32(got, formula, x, scale, bias, residual)


@pytest.mark.parametrize("terms", [131073, 262150])
def test_long_sums_of_floats(impl: str, terms: int) -> None:
    x, w, scale = flat(2, terms), weights(3, terms), scales(3)
    got = int8.weight_only_linear(x, w, scale, impl=impl)
    exact = (x.double() @ w.double().T) * scale.double()
    assert (got - exact).abs().max() <= 1e-5 * (x.double().abs() @ w.double().abs().T * scale.double()).max()


def test_what_is_not_finite_stays_in_its_row(impl: str) -> None:
    x, w, scale = flat(4, 5), weights(20, 5).clamp(min=1), scales(20)
    clean = int8.weight_only_linear(x, w, scale, impl=impl)
    x[1, 4], x[2, 0] = torch.nan, torch.inf
    got = int8.weight_only_linear(x, w, scale, impl=impl)
    assert got[1].isnan().all()
    assert (got[2] == torch.inf).all()
    torch.testing.assert_close(got[[0, 3]], clean[[0, 3]])


def test_edges_of_linear_layers(impl: str) -> None:
    bias = flat(5)
    assert torch.equal(int8.weight_only_linear(torch.zeros(3, 0), weights(5, 0), scales(5), bias, impl=impl),
                       bias.expand(3, 5))  # fmt: skip
    assert int8.weight_only_linear(flat(0, 7), weights(5, 7), scales(5), impl=impl).shape == (0, 5)
    assert int8.weight_only_linear(flat(2, 7), weights(0, 7), scales(0), impl=impl).shape == (2, 0)
    x, w = flat(2, 3, 7), weights(5, 7)
    got = int8.weight_only_linear(x, w, scales(5), bias, impl=impl)
    torch.testing.assert_close(got, x @ (w * scales(5).unsqueeze(1)).T + bias)
    wide = int8.weight_only_linear(x.double(), w, scales(5).double(), bias.double())
    torch.testing.assert_close(wide, x.double() @ (w * scales(5).double().unsqueeze(1)).T + bias.double())
