"""The bar that every number is held to: it lets rounding pass and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastkd import testing
from fastkd.testing import assert_as_exact_as_fp32, exact_and_error, flat_logits

FACTOR = 256.0
INF, NAN = math.inf, math.nan
E = torch.tensor([1e-6, 1e-3], dtype=torch.float64)  # what float32 gets wrong in each of two rows
EXACT = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]], dtype=torch.float64)


def check(got: Tensor, exact: Tensor = EXACT, error: Tensor = E) -> None:
    testing._check(0, got, exact, error, FACTOR, 0.0)


def off(row: int, column: int, errors: float) -> Tensor:
    """EXACT with one element wrong by so many times its row's E."""
    got = EXACT.clone()
    got[row, column] += errors * E[row]
    return got


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_is_judged_by_its_own_error(row: int, sign: int) -> None:
    for errors in (0, 150, 250):
        check(off(row, 2, sign * errors))
    for errors in (262, 1000):
        with pytest.raises(AssertionError, match=rf"1 of 6 elements are off, worst at \({row}, 2\)"):
            check(off(row, 2, sign * errors))


def test_the_message_names_the_worst_element() -> None:
    got = off(0, 1, 1000)
    got[1, 0] += 5000 * E[1]
    with pytest.raises(AssertionError, match=r"output 0: 2 of 6 .*worst at \(1, 0\): got 9\.0.*, exact 4\.0, allowed"):
        check(got)


def test_rounding_to_the_storage_is_no_error() -> None:
    """One step of the dtype of ``got``, and near 0 its smallest number."""
    nothing = torch.zeros(2, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = EXACT * (1 + 0.9 * torch.finfo(dtype).eps)
        check(EXACT.to(dtype), exact, nothing)
        with pytest.raises(AssertionError, match="6 of 6"):
            check(EXACT.to(dtype), EXACT * (1 + 2 * torch.finfo(dtype).eps), nothing)
    check(torch.zeros(2, 3), EXACT * 1e-46, nothing)


@pytest.mark.parametrize(
    ("exact", "got"), [(INF, 1e30), (INF, NAN), (INF, -INF), (2.0, INF), (2.0, NAN), (NAN, 2.0), (NAN, INF)]
)
def test_what_is_not_finite_has_to_be_the_same(exact: float, got: float) -> None:
    want, one = EXACT.clone(), EXACT.clone()
    want[1, 1], one[1, 1] = exact, got
    check(want.clone(), want)
    with pytest.raises(AssertionError, match=r"1 of 6 elements are off, worst at \(1, 1\)"):
        check(one, want)


def test_the_shape_has_to_be_right() -> None:
    with pytest.raises(AssertionError, match=r"has shape \(3, 2\), not \(2, 3\)"):
        check(EXACT.T)
    with pytest.raises(AssertionError, match=r"has shape \(2, 1\), not \(2, 3\)"):
        check(EXACT[:, :1])
    check(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64), E[:0])


def test_a_reduced_value_is_judged_by_its_rows_together() -> None:
    exact, error = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.full((3,), 1e-4, dtype=torch.float64)
    check(exact.sum() + 250 * 3e-4, exact, error)
    with pytest.raises(AssertionError, match=r"1 of 1 elements are off, worst at \(\): got 6\.\d+, exact 6\.0"):
        check(exact.sum() + 262 * 3e-4, exact, error)


def doubled(x: Tensor) -> Tensor:
    """2 x, but 0.25 too much in float32 wherever 1 was moved by one float32 ulp: exact by luck at 1 alone."""
    if x.dtype is torch.float64:
        return 2 * x
    return 2 * x + 0.25 * (x != 1)


def test_the_error_is_the_largest_over_jittered_copies() -> None:
    x = torch.ones(3, 4)
    exact, error = exact_and_error(doubled, x)
    assert torch.equal(exact[0], torch.full((3, 4), 2.0, dtype=torch.float64))
    assert error[0].tolist() == pytest.approx([0.25] * 3)
    assert exact_and_error(doubled, x, copies=0)[1][0].tolist() == [0.0] * 3
    assert torch.equal(x, torch.ones(3, 4))


@pytest.mark.parametrize("bad", range(9))
def test_the_error_is_of_the_worst_copy_and_the_worst_element(bad: int) -> None:
    """Whichever evaluation is off, the inputs as given (0) or a copy, and in one element of one row alone."""
    evaluations = 0

    def off_once(x: Tensor) -> Tensor:
        nonlocal evaluations
        if x.dtype is torch.float64:
            return x.clone()
        result = x.clone()
        result[1, 2] += 0.5 * (evaluations == bad)
        evaluations += 1
        return result

    _, (error,) = exact_and_error(off_once, torch.ones(2, 3))
    assert evaluations == 9
    assert error.tolist() == pytest.approx([0, 0.5])


def test_a_copys_error_is_measured_at_the_copy() -> None:
    """A steep function moves with its input: that is no error of float32's."""
    _, (error,) = exact_and_error(lambda x: x * 2.0**40, torch.ones(2, 3))
    assert error.tolist() == [0, 0]


def test_what_is_not_finite_is_no_error_and_is_not_jittered() -> None:
    x = torch.tensor([[1.0, INF], [-INF, 2.0]])
    seen: list[list[bool]] = []

    def compute(x: Tensor) -> Tensor:
        seen.append(x.isinf().tolist())
        return x + 0

    (exact,), (error,) = exact_and_error(compute, x)
    assert all(infinite == x.isinf().tolist() for infinite in seen)
    assert torch.equal(exact, x.double())
    assert error.tolist() == [0, 0]


def test_exact_is_of_the_inputs_as_they_are() -> None:
    """Float64 inputs are not rounded first, integers stay integers, several outputs are kept apart."""
    x, ids = torch.full((2, 1), 1 / 3, dtype=torch.float64), torch.tensor([[3], [4]])

    def both(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        assert ids.dtype is torch.int64
        return x + 0, x * ids

    (same, product), errors = exact_and_error(both, x, ids)
    assert torch.equal(same, x)
    assert torch.equal(product, x * ids)
    assert [tuple(error.shape) for error in errors] == [(2,), (2,)]
    _, (error,) = exact_and_error(lambda x: x + 0, x[:0])
    assert error.shape == (0,)


def log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def test_the_public_assertion() -> None:
    x = flat_logits(4, 300)
    got = log_softmax(x)
    assert_as_exact_as_fp32(got, log_softmax, x)
    _, (error,) = exact_and_error(log_softmax, x)
    for errors in (150, -150):
        assert_as_exact_as_fp32(log_softmax(x.double()) + errors * error[:, None], log_softmax, x)
    wrong = log_softmax(x.double())
    wrong[2, 7] += 1000 * error[2]
    with pytest.raises(AssertionError, match=r"output 0: 1 of 1200 elements are off, worst at \(2, 7\)"):
        assert_as_exact_as_fp32(wrong, log_softmax, x)
    assert_as_exact_as_fp32(wrong, log_softmax, x, factor=1100)
    assert_as_exact_as_fp32(wrong, log_softmax, x, slack=[1000 * error.max()])
    with pytest.raises(AssertionError, match="worst at"):
        assert_as_exact_as_fp32(wrong, log_softmax, x, slack=[10 * error.max()])


def test_the_public_assertion_looks_at_every_output() -> None:
    x = flat_logits(4, 30)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.logsumexp(-1), x.softmax(-1)

    total, probabilities = compute(x)
    assert_as_exact_as_fp32((total.sum(), probabilities), compute, x)
    with pytest.raises(AssertionError, match=r"output 1: \d+ of 120"):
        assert_as_exact_as_fp32((total, probabilities * 1.001), compute, x)
    with pytest.raises(AssertionError, match="output 0: 1 of 1"):
        assert_as_exact_as_fp32((total.sum() * 1.001, probabilities), compute, x)
    with pytest.raises(AssertionError, match="1 outputs, 2 expected"):
        assert_as_exact_as_fp32(total, compute, x)
