"""int8 linear layers: every implementation gives the bits of the formula, whatever the shape, strides and dtype."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from int8_problems import (
    ACTIVATIONS,
    DTYPES,
    as_many_as_fill_the_caches,
    assert_same_bits,
    flat,
    int8,
    linear,
    scales,
    sharp,
    weights,
)
from torch import Tensor

from fastkd.testing import assert_as_exact_as_fp32

IMPLEMENTATIONS = ("reference", "native")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 63, 64, 65, 130)
TERMS = (1, 2, 3, 4, 5, 7, 8, 31, 64, 65, 130, 257, 300)  # long sums lie in other blocks than short ones
COLUMNS = (1, 3, 8, 15, 16, 17, 31, 33, 48, 49, 64, 80, 97, 129, 200)


def strided(rows: int, terms: int, dtype: torch.dtype, dice: random.Random) -> Tensor:
    """Contiguous, rows with a gap between them, or transposed."""
    layout = dice.choice(["contiguous", "gap", "transposed"])
    if layout == "transposed":
        return flat(terms, rows, seed=rows, dtype=dtype).T
    return flat(rows, terms + (5 if layout == "gap" else 0), seed=rows, dtype=dtype)[:, :terms]


@pytest.mark.parametrize("seed", range(80))
def test_any_shape_has_the_bits_of_the_formula(impl: str, seed: int) -> None:
    dice = random.Random(seed)
    rows, terms, columns = dice.choice(ROWS), dice.choice(TERMS), dice.choice(COLUMNS)
    dtype, activation = dice.choice(DTYPES), dice.choice(["none", "relu"])
    x, w, scale = strided(rows, terms, dtype, dice), weights(columns, terms, seed=seed), scales(columns, seed)
    bias = flat(columns, seed=1) if dice.random() < 0.7 else None
    residual = strided(rows, columns, dtype, dice) if dice.random() < 0.5 else None
    step = 0.021 if dice.random() < 0.4 else None
    given = None if step is None else torch.tensor(step)
    got = int8.linear(x, w, scale, bias, input_scale=given, activation=activation, residual=residual, impl=impl)
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert_same_bits(got, ACTIVATIONS[activation](linear(x, w, scale, bias, step, residual)))


@pytest.mark.parametrize("terms", [1000, 65536, 131072, 131073, 140000, 262150])
def test_sums_are_exact_however_long(impl: str, terms: int) -> None:
    """Extreme numbers, of one sign and of several: 32 bits hold 2^17 products, and little more.

    Large random ones beside them, whose sums have digits that a float would lose on the way.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([127.0, -127.0, 126.0, -127.0]).repeat(terms)[:terms]
    large = torch.randint(100, 128, (2, terms), generator=generator)
    x = torch.stack([torch.full((terms,), 127.0), signs, large[0]])
    w = torch.cat([torch.full((1, terms), -128), torch.full((1, terms), 127), weights(1, terms), large[1:], -large[1:]])
    w = w.to(torch.int8)
    w[4, 0] = 127  # not just the other sign
    got = int8.linear(x, w, torch.ones(5), input_scale=torch.tensor(1.0), impl=impl)
    want = x.double() @ w.double().T
    assert want.abs().max() == 127 * 128 * terms
    assert_same_bits(got, want.float())


def test_every_integer_of_a_small_sum_comes_out(impl: str) -> None:
    x, w = weights(17, 33, seed=1).float().clamp(min=-127), weights(20, 33)
    got = int8.linear(x, w, torch.ones(20), input_scale=torch.tensor(1.0), impl=impl)
    assert torch.equal(got.long(), x.long() @ w.long().T)


def test_a_half_is_rounded_to_even(impl: str) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 300.0, -128.0]])
    got = int8.linear(x.T.contiguous(), torch.ones(1, 1, dtype=torch.int8), torch.ones(1),
                      input_scale=torch.tensor(1.0), impl=impl)  # fmt: skip
    assert got.flatten().tolist() == [0, 2, 2, 0, -2, 127, 127, -127]


@pytest.mark.parametrize("own_step", [True, False])
@pytest.mark.parametrize("size", [1.0, 2.0**-59, 2.0**-61, 1e-36, 2.0**59, 2.0**61, 1e34])
def test_numbers_are_those_of_a_division(impl: str, size: float, own_step: bool) -> None:
    """Halves of a step and the floats next to them: the last bit of the quotient decides where they go."""
    generator = torch.Generator().manual_seed(0)
    steps = (torch.rand(40, 1, generator=generator) + 0.5) * size
    halves = ((torch.arange(-127, 127) + 0.5) * steps).float()
    below, above = (torch.nextafter(halves, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    x = torch.cat([127 * steps, halves, below, above], 1)
    rows = [x] if own_step else x.split(1)
    for one, step in zip(rows, [None] if own_step else steps.flatten(), strict=True):
        w, given = torch.eye(one.shape[1], dtype=torch.int8), None if step is None else float(step)
        got = int8.linear(one, w, torch.ones(len(w)), input_scale=step, impl=impl)
        assert_same_bits(got, linear(one, w, torch.ones(len(w)), None, given, None))


def nearest_quotients() -> Iterator[tuple[float, float]]:
    """Floats whose quotient is as near as can be to where another number begins: beside a half, between two floats.

    With integers ``x`` and ``step`` of 24 bits, ``2**shift * x = step * middle + rest`` for a middle of 25 or 26 bits.
    """
    for half, shift, rest, side in itertools.product(range(127), (24, 25, 26), range(-8, 9), (-1, 1)):
        fine = half == 0 and side < 0  # floats lie closer below a power of two
        middle = int(math.frexp(half + 0.5)[0] * 2 ** (26 if fine else 25)) + side
        step = -rest * pow(middle, -1, 2**shift) % 2**shift
        x, nothing = divmod(step * middle + rest, 2**shift)
        if 2**23 <= step < 2**24 and 2**23 <= x < 2**24:
            assert nothing == 0
            yield float(x), math.ldexp(step, -round(math.log2((half + 0.5) * step / x)))


def test_the_quotients_that_come_nearest_to_a_half(impl: str) -> None:
    w, one = torch.ones(1, 1, dtype=torch.int8), torch.ones(1)
    pairs = list(nearest_quotients())
    assert len(pairs) > 1000
    for x, step in pairs:
        got = int8.linear(torch.tensor([[x]]), w, one, input_scale=torch.tensor(step), impl=impl)
        assert float(got) == np.rint(np.float32(x) / np.float32(step)) * np.float32(step), (x, step)


def test_within_two_ulp_of_the_exact_number(impl: str) -> None:
    x, w, scale, bias = flat(9, 300), weights(40, 300), scales(40), flat(40)
    got = int8.linear(x, w, scale, bias, input_scale=torch.tensor(0.02), impl=impl).double()
    numbers = (x / torch.tensor(0.02)).round().clamp(-127, 127).double()
    product = (numbers @ w.double().T) * scale.double() * float(torch.tensor(0.02))
    assert ((got - (product + bias.double())).abs() <= 2**-23 * (product.abs() + bias.double().abs())).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [1024, 1019])
def test_activations_are_as_exact_as_float32(impl: str, activation: str, columns: int) -> None:
    """Of any number: a row of zeros gives the bias."""
    spread = torch.cat([flat(columns // 2) * 3, torch.linspace(-100, 100, columns - columns // 2)])
    got = int8.linear(torch.zeros(2, 4), weights(columns, 4), scales(columns), spread, activation=activation, impl=impl)
    for row in got:
        assert_as_exact_as_fp32(row, lambda x: sharp(activation, x), spread)
    if activation in ("none", "relu"):
        assert_same_bits(got[0], ACTIVATIONS[activation](spread))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_extremes(impl: str, activation: str) -> None:
    biggest = torch.finfo(torch.float32).max
    bias = torch.tensor([0.0, 1e-40, -1e-40, 1e-30, -1e-30, biggest, -biggest, torch.inf, -torch.inf, torch.nan] * 5)
    got = int8.linear(torch.zeros(1, 4), weights(50, 4), scales(50), bias, activation=activation, impl=impl)[0]
    flat_below = activation != "none"
    want = [0, None, None, None, None, biggest, 0 if flat_below else -biggest, torch.inf]
    want += [0 if flat_below else -torch.inf, torch.nan]
    for value, expected in zip(got.tolist(), want * 5, strict=True):
        if expected is None:
            assert abs(value) < 2e-30
        else:
            assert value == expected or (value != value and expected != expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_join_the_rest(impl: str, activation: str, dtype: torch.dtype) -> None:
    x, w, scale, bias, residual = flat(5, 70, dtype=dtype), weights(50, 70), scales(50), flat(50), flat(5, 50, seed=2)
    residual = residual.to(dtype)
    got = int8.linear(x, w, scale, bias, activation=activation, residual=residual, impl=impl)
    before = linear(x, w, scale, bias, None, residual)
    want = ACTIVATIONS[activation](before.double())
    tolerance = torch.finfo(dtype).eps * (0.51 if dtype is not torch.float32 else 8)
    assert ((got.double() - want).abs() <= tolerance * want.abs() + 4e-7 * before.abs()).all()


@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_and_harms_no_other(impl: str, wrong: float, step: float | None) -> None:
    x, w, scale, bias = flat(7, 40), weights(33, 40), scales(33), flat(33)
    given = None if step is None else torch.tensor(step)
    clean = int8.linear(x, w, scale, bias, input_scale=given, impl=impl)
    for column in (0, 17, 39):
        broken = x.clone()
        broken[3, column] = wrong
        for activation in ACTIVATIONS:
            got = int8.linear(broken, w, scale, bias, input_scale=given, activation=activation, impl=impl)
            assert got[3].isnan().all()
            assert got[[0, 1, 2, 4, 5, 6]].isfinite().all()
        got = int8.linear(broken, w, scale, bias, input_scale=given, impl=impl)
        assert torch.equal(got[[0, 1, 2, 4, 5, 6]], clean[[0, 1, 2, 4, 5, 6]])


def test_a_step_of_few_digits(impl: str) -> None:
    """The step of 190 smallest floats is one of them: there are numbers of more than 127 steps."""
    x = torch.tensor([[190.0, -150.0, 128.0, 1.0], [300.0, -299.0, 250.0, 0.0], [127.0, -127.0, 64.0, 63.0]])
    x = (x * 2.0**-100) * 2.0**-49
    w, scale = torch.eye(4, dtype=torch.int8), torch.full((4,), 2.0**100)
    got = int8.linear(x, w, scale, impl=impl)
    assert_same_bits(got, linear(x, w, scale, None, None, None))
    assert (got[0] * 2.0**49).tolist() == [127, -127, 127, 1]


def test_rows_of_zeros_and_of_next_to_nothing_give_the_bias(impl: str) -> None:
    x, bias = torch.zeros(4, 10), flat(20)
    x[1:3] = torch.tensor([[1e-45], [-1e-45]])
    got = int8.linear(x, weights(20, 10), scales(20), bias, impl=impl)
    assert_same_bits(got, bias.expand(4, 20))


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e20, 3e38])
def test_any_size_of_input(impl: str, size: float) -> None:
    x = flat(3, 40).clamp(-1, 1) * size
    w, scale = weights(20, 40), scales(20) * 1e-3
    assert_same_bits(int8.linear(x, w, scale, impl=impl), linear(x, w, scale, None))


def test_sums_whose_parts_cancel(impl: str) -> None:
    """What is left of two parts of 2^31 each is a small number, exact to its last digit."""
    terms = 2**18
    x = torch.full((1, terms), 127.0)
    x[0, 7] = 126.0
    w = torch.full((2, terms), 127, dtype=torch.int8)
    w[:, terms // 2 :] = -127
    w[1, 3] = 126
    got = int8.linear(x, w, torch.ones(2), input_scale=torch.tensor(1.0), impl=impl)
    assert got.flatten().tolist() == [-127.0, -254.0]


@pytest.mark.parametrize("shape", [(40,), (0, 40), (3, 0, 40), (2, 3, 40), (1, 1, 1, 40)])
def test_leading_dimensions(impl: str, shape: tuple[int, ...]) -> None:
    x, w, scale, bias = flat(*shape), weights(20, 40), scales(20), flat(20)
    residual = flat(*shape[:-1], 20, seed=3)
    got = int8.linear(x, w, scale, bias, residual=residual, impl=impl)
    assert got.shape == (*shape[:-1], 20)
    assert_same_bits(got.reshape(-1, 20), linear(x.reshape(-1, 40), w, scale, bias, None, residual.reshape(-1, 20)))


def test_no_terms_and_no_columns(impl: str) -> None:
    bias = flat(5)
    got = int8.linear(torch.zeros(3, 0), weights(5, 0), scales(5), bias, impl=impl)
    assert torch.equal(got, bias.expand(3, 5))
    assert int8.linear(flat(3, 7), weights(0, 7), scales(0), impl=impl).shape == (3, 0)
    deep = int8.linear(torch.zeros(2, 3, 0), weights(5, 0), scales(5), bias, impl=impl)
    assert torch.equal(deep, bias.expand(2, 3, 5))
    assert torch.equal(int8.linear(torch.zeros(0), weights(5, 0), scales(5), bias, impl=impl), bias)


def test_scale_and_bias_of_other_dtypes_and_strides(impl: str) -> None:
    x, w, scale, bias = flat(3, 40), weights(20, 40), scales(20).half(), flat(20).bfloat16()
    got = int8.linear(x, w, scale.repeat_interleave(2)[::2], bias, impl=impl)
    assert_same_bits(got, linear(x, w, scale.float(), bias.float()))
    got = int8.linear(x, w.T.contiguous().T, scale.double(), impl=impl)
    assert_same_bits(got, linear(x, w, scale.float(), None))


def test_float64_is_computed_in_float64() -> None:
    x, w, scale = flat(3, 40).double(), weights(20, 40), scales(20).double()
    steps = x.abs().amax(1, keepdim=True) / 127
    want = (x / steps).round() @ w.double().T * scale * steps
    torch.testing.assert_close(int8.linear(x, w, scale), want, rtol=1e-14, atol=0)


def test_inputs_are_left_alone(impl: str) -> None:
    tensors = [flat(9, 40), weights(20, 40), scales(20), flat(20), torch.tensor(0.1), flat(9, 20)]
    copies = [tensor.clone() for tensor in tensors]
    x, w, scale, bias, step, residual = tensors
    int8.linear(x, w, scale, bias, input_scale=step, residual=residual, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.native
def test_threads_change_no_bit() -> None:
    """Large enough for several chunks, and for rows in several rounds of memory."""
    x, w, scale, bias = flat(300, 400), weights(200, 400), scales(200), flat(200)
    wide, narrow = flat(100, 120000), weights(3, 120000)
    want = [int8.linear(x, w, scale, bias, impl="native"), int8.linear(wide, narrow, scale[:3], impl="native")]
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(int8.linear(x, w, scale, bias, impl="native"), want[0])
        assert torch.equal(int8.linear(wide, narrow, scale[:3], impl="native"), want[1])
    assert_same_bits(want[0], linear(x, w, scale, bias))
    assert_same_bits(want[1], linear(wide, narrow, scale[:3], None))


@pytest.mark.native
@pytest.mark.parametrize("columns", [1024, 1019])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_that_are_larger_than_the_caches(columns: int, activation: str, threads: int) -> None:
    """They are written past these, where their rows are whole lines: the bits are those of a few rows at a time."""
    rows = as_many_as_fill_the_caches(4 * columns) + 5
    x, w, scale, bias = flat(rows, 12), weights(columns, 12), scales(columns), flat(columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = int8.linear(x, w, scale, bias, activation=activation, impl="native")
    finally:
        torch.set_num_threads(before)
    for few, part in zip(x.split(1000), output.split(1000), strict=True):
        assert_same_bits(part, int8.linear(few, w, scale, bias, activation=activation, impl="native"))


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "terms"), [*((rows, 12) for rows in range(1, 10)), (67, 12), (67, 150)])
def test_outputs_that_have_left_the_nearest_cache(rows: int, terms: int, threads: int) -> None:
    """They are fetched while sums are made: the bits are those of a few columns at a time, which are small outputs.

    A tile of 150 terms has more words than lines to fetch, one of 12 fewer.
    """
    columns = 9 * 2**16 // rows + 20  # of more than 2 MB
    x, w, scale, bias = flat(rows, terms), weights(columns, terms), scales(columns), flat(columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = int8.linear(x, w, scale, bias, impl="native")
    finally:
        torch.set_num_threads(before)
    for part, *layer in zip(*(tensor.split(8 * 2**10 // rows) for tensor in (output.T, w, scale, bias)), strict=True):
        assert_same_bits(part.T, int8.linear(x, *layer, impl="native"))


def test_a_lazy_minus_sign_is_a_sign(impl: str) -> None:
    """Which tensors carry that are made by conj(): their memory holds the other sign."""
    negated = torch._neg_view
    for terms in (1, 9):
        x, w, scale, bias, residual = flat(5, terms), weights(7, terms), scales(7), flat(7), flat(5, 7, seed=2)
        want = int8.linear(-x, w, -scale, -bias, residual=-residual, impl=impl)
        got = int8.linear(negated(x), w, negated(scale), negated(bias), residual=negated(residual), impl=impl)
        assert torch.equal(got, want)
        want = int8.linear(x, w, scale, input_scale=torch.tensor(0.02), impl=impl)
        assert torch.equal(int8.linear(x, w, scale, input_scale=negated(torch.tensor(-0.02)), impl=impl), want)
        image, kernel = x.view(5, terms, 1, 1), w.view(7, terms, 1, 1)
        want = int8.conv2d(-image, kernel, scale, residual=-residual.view(5, 7, 1, 1), impl=impl)
        residual = negated(residual).view(5, 7, 1, 1)
        assert torch.equal(int8.conv2d(negated(image), kernel, scale, residual=residual, impl=impl), want)
