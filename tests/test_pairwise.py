"""Matrices of distances and cosines: every implementation against the formula in float64, and torch.cdist beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from feature_problems import flat
from pair_problems import ADVERSARIAL
from torch import Tensor

from fastkd import pairwise_cosine, pairwise_distance
from fastkd.losses._logit_autograd import NO_SECOND_DERIVATIVE
from fastkd.testing import assert_as_exact_as_fp32

Matrix = Callable[..., Tensor]
IMPLEMENTATIONS = ("reference", "algebra", "native")
ANYWHERE = ("reference", "algebra")
# N, M and D
SHAPES = [(1, 1, 1), (2, 3, 4), (7, 8, 9), (16, 17, 5), (33, 15, 8)]
EMPTY = [(5, 0, 3), (0, 4, 3), (3, 4, 0), (0, 0, 0)]


def naive_distance(x: Tensor, y: Tensor) -> Tensor:
    difference = x[:, None] - y
    equal = (difference == 0).all(-1)
    return difference.masked_fill(equal[..., None], 1).norm(dim=-1).masked_fill(equal, 0)


def naive_squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(-1)


def naive_cosine(x: Tensor, y: Tensor) -> Tensor:
    def unit(rows: Tensor) -> Tensor:
        short = rows.norm(dim=-1, keepdim=True) < 1e-12
        return F.normalize(rows.masked_fill(short, 1), dim=-1).masked_fill(short, 0)

    return unit(x) @ unit(y).T


def squares(x: Tensor, y: Tensor | None = None, **options: object) -> Tensor:
    return pairwise_distance(x, y, squared=True, **options)


CASES = [
    pytest.param(
        impl, matrix, naive, id=f"{impl}-{naive.__name__}", marks=pytest.mark.native if impl == "native" else ()
    )
    for matrix, naive, impls in (
        (pairwise_distance, naive_distance, IMPLEMENTATIONS),
        (squares, naive_squares, IMPLEMENTATIONS),
        (pairwise_cosine, naive_cosine, ANYWHERE),
    )
    for impl in impls
]
each = pytest.mark.parametrize(("by", "matrix", "naive"), CASES)


def upstream(n: int, m: int) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(9))


def results(matrix: Matrix, x: Tensor, y: Tensor | None, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """Values and gradients under an upstream gradient that is no symmetric matrix."""
    leaves = [z.detach().requires_grad_() for z in (x, y) if z is not None]
    value = matrix(*leaves)
    grad = upstream(*value.shape) if grad is None else grad
    return value.detach(), *torch.autograd.grad(value, leaves, grad.to(value.dtype))


def judge(matrix: Matrix, naive: Matrix, x: Tensor, y: Tensor | None, by: str) -> None:
    got = results(lambda *rows: matrix(*rows, impl=by), x, y)
    rows = [z for z in (x, y) if z is not None]
    assert [grad.dtype for grad in got[1:]] == [z.dtype for z in rows]

    def formula(*inputs: Tensor) -> tuple[Tensor, ...]:
        *rows, grad = inputs
        return results(lambda *z: naive(z[0], z[-1]), rows[0], None if y is None else rows[1], grad)

    assert_as_exact_as_fp32(got, formula, *rows, upstream(*got[0].shape))


@each
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(by: str, matrix: Matrix, naive: Matrix, shape: tuple[int, int, int]) -> None:
    n, m, d = shape
    judge(matrix, naive, flat(n, d), flat(m, d, 1), by)
    judge(matrix, naive, flat(n, d), None, by)
    if n > 2 < m and d:
        assert all(
            (grad.abs() > 1e-3).any() for grad in results(lambda *z: matrix(*z, impl=by), flat(n, d), flat(m, d, 1))
        )


@each
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(by: str, matrix: Matrix, naive: Matrix, shape: tuple[int, int, int]) -> None:
    n, m, d = shape
    value, of_x, of_y = results(lambda *z: matrix(*z, impl=by), flat(n, d), flat(m, d, 1))
    assert torch.equal(value, torch.zeros(n, m))
    assert torch.equal(of_x, torch.zeros(n, d))
    assert torch.equal(of_y, torch.zeros(m, d))
    assert matrix(flat(n, d), impl=by).shape == (n, n)


@each
@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_adversarial(by: str, matrix: Matrix, naive: Matrix, problem: str) -> None:
    x, teacher = ADVERSARIAL[problem]()
    for rows in (x, teacher):
        for y in (None, rows[: len(rows) // 2 + 1].flip(0)):
            got = results(lambda *z: matrix(*z, impl=by), rows, y)
            assert all(one.isfinite().all() for one in got)
            judge(matrix, naive, rows, y, by)


@each
def test_rows_far_closer_than_they_are_long(by: str, matrix: Matrix, naive: Matrix) -> None:
    """Their direction is lost in any sum of rows."""
    x, y = flat(8, 3), flat(6, 3, 1)
    x[:2] = torch.tensor([1.0, 2.0, 0.0])
    y[0] = x[0]
    x[1, 2], y[0, 2] = 1e-12, 1e-11
    judge(matrix, naive, x, None, by)
    judge(matrix, naive, x, y, by)
    if matrix is pairwise_distance:
        torch.testing.assert_close(matrix(x, y, impl=by)[:2, 0], torch.tensor([1e-11, 9e-12]), rtol=1e-6, atol=0)


@each
def test_dtypes(by: str, matrix: Matrix, naive: Matrix) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        judge(matrix, naive, flat(9, 5).to(dtype), flat(6, 5, 1).to(dtype), by)
    judge(matrix, naive, flat(9, 5).half(), flat(6, 5, 1), by)
    if by != "native":
        x, y = flat(9, 5).double().requires_grad_(), flat(6, 5, 1).double().requires_grad_()
        assert matrix(x, y.float(), impl=by).dtype is torch.float64
        assert torch.autograd.gradcheck(lambda x, y: matrix(x, y, impl=by), (x, y))
        assert torch.autograd.gradcheck(lambda x: matrix(x, impl=by), (x,))


@each
def test_diagonal(by: str, matrix: Matrix, naive: Matrix) -> None:
    x = 100 + 1e-3 * flat(40, 6)
    value = matrix(x, impl=by)
    assert torch.equal(value, value.T)
    expected = torch.ones(40) if matrix is pairwise_cosine else torch.zeros(40)
    if by != "reference" or matrix is not pairwise_cosine:
        assert torch.equal(value.diagonal(), expected)


@pytest.mark.parametrize("by", ["algebra", pytest.param("native", marks=pytest.mark.native)])
def test_a_row_that_is_not_finite_harms_no_other(by: str) -> None:
    x = flat(12, 4)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[5, 1] = bad
        for matrix in (pairwise_distance, squares):
            value, sound = matrix(broken, impl=by), matrix(x, impl=by)
            others = torch.arange(12) != 5
            torch.testing.assert_close(value[others][:, others], sound[others][:, others], rtol=1e-6, atol=0)
            assert (~value[5].isfinite()).all()


@pytest.mark.parametrize("by", ["reference", "algebra", pytest.param("native", marks=pytest.mark.native)])
def test_where_cdist_fails(by: str) -> None:
    """Rows far from the origin, equal rows, half precision."""
    x = flat(30, 4) + 1000
    exact = naive_distance(x.double(), x.double())

    def error(distances: Tensor) -> float:
        return float((distances.double() - exact).abs().max() / exact.max())

    assert error(torch.cdist(x, x)) > 0.02
    assert torch.cdist(x, x).diagonal().max() > 0.1
    assert error(pairwise_distance(x, impl=by)) < 1e-7
    assert (pairwise_distance(x, impl=by).diagonal() == 0).all()

    near = (100 + 1e-3 * flat(30, 4)).requires_grad_()
    (lost,) = torch.autograd.grad(torch.cdist(near, near).sum(), near)
    (kept,) = torch.autograd.grad(pairwise_distance(near, impl=by).sum(), near)
    wide = near.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(naive_distance(wide, wide).sum(), wide)
    assert (lost - slope).abs().max() > 10
    assert (kept - slope).abs().max() < 1e-4

    with pytest.raises(RuntimeError, match="Half"):
        torch.cdist(flat(9, 4).half(), flat(9, 4).half())
    assert pairwise_distance(flat(9, 4).half(), impl=by).isfinite().all()


@each
def test_layouts(by: str, matrix: Matrix, naive: Matrix) -> None:
    x, y = flat(9, 6), flat(7, 6, 1)
    want = results(lambda *z: matrix(*z, impl=by), x, y)
    got = results(lambda *z: matrix(*z, impl=by), x.T.contiguous().T, y.repeat_interleave(2, 1)[:, ::2])
    torch.testing.assert_close(got, want)
    rows = x[:1].expand(5, -1)
    torch.testing.assert_close(matrix(rows, y, impl=by), matrix(x[:1], y, impl=by).expand(5, -1))
    leaf = x.clone().requires_grad_()
    matrix(leaf, y, impl=by).sum().backward()  # an upstream gradient of stride 0
    assert leaf.grad.isfinite().all()
    assert torch.equal(leaf, x)


@each
def test_only_one_side_needs_a_gradient(by: str, matrix: Matrix, naive: Matrix) -> None:
    x, y = flat(9, 6), flat(7, 6, 1)
    _, of_x, of_y = results(lambda *z: matrix(*z, impl=by), x, y)
    for side, want in ((0, of_x), (1, of_y)):
        pair = [x.clone(), y.clone()]
        pair[side].requires_grad_()
        value = matrix(*pair, impl=by)
        value.backward(upstream(*value.shape))
        torch.testing.assert_close(pair[side].grad, want)
        assert pair[1 - side].grad is None
    assert not matrix(x, y, impl=by).requires_grad


@each
def test_shapes_without_numbers(by: str, matrix: Matrix, naive: Matrix) -> None:
    x = flat(5, 3).to("meta").requires_grad_()
    result = matrix(x, x[:2])
    result.sum().backward()
    assert result.is_meta
    assert result.shape == (5, 2)


@each
def test_no_second_derivative(by: str, matrix: Matrix, naive: Matrix) -> None:
    for y in (None, flat(4, 3, 1)):
        x = flat(5, 3).requires_grad_()
        total = matrix(x, y, impl=by).sum()
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        for differentiate in (lambda z: z.backward(retain_graph=True), lambda z: torch.autograd.grad(z, x)):  # noqa: B023
            with pytest.raises(RuntimeError) as raised:
                differentiate(total + grad.square().sum())
            assert NO_SECOND_DERIVATIVE in str(raised.value)


@each
def test_traced(by: str, matrix: Matrix, naive: Matrix) -> None:
    torch._dynamo.reset()
    for y in (None, flat(4, 3, 1).half()):
        call = lambda *z: matrix(*[one * 1 for one in z], impl=by)  # noqa: E731
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(results(compiled, flat(5, 3), y), results(call, flat(5, 3), y))


@each
def test_modes(by: str, matrix: Matrix, naive: Matrix) -> None:
    x, y = flat(5, 3), flat(4, 3, 1)
    want = results(lambda *z: matrix(*z, impl=by), x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(lambda *z: matrix(*z, impl=by), x, y)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.inference_mode():
        assert torch.equal(matrix(x.clone(), y.clone(), impl=by), want[0])


@pytest.mark.native
def test_the_same_bits_with_any_number_of_threads() -> None:
    x, y = flat(150, 70), flat(130, 70, 1)
    for other in (None, y):
        want = results(lambda *z: pairwise_distance(*z, impl="native"), x, other)
        for threads in (2, 3, 3, 5):
            torch.set_num_threads(threads)
            got = results(lambda *z: pairwise_distance(*z, impl="native"), x, other)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_larger() -> None:
    """More than one block of the matrix product."""
    x = flat(300, 9)
    got = results(lambda x: pairwise_distance(x, impl="algebra"), x, None)
    want = results(lambda x: pairwise_distance(x, impl="native"), x, None)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(pairwise_cosine(x), naive_cosine(x.double(), x.double()).float())


ARGUMENTS = [
    (TypeError, "x must be a tensor, got list", {"x": [[1.0]]}),
    (TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64", {"x": torch.ones(2, 3).long()}),
    (ValueError, "x must have the shape (rows, D), got (3,)", {"x": torch.ones(3)}),
    (ValueError, "x must have the shape (rows, D), got (1, 2, 3)", {"x": torch.ones(1, 2, 3)}),
    (TypeError, "y must be a tensor, got int", {"y": 3}),
    (ValueError, "y must have the shape (rows, D), got (3,)", {"y": torch.ones(3)}),
    (ValueError, "y must have rows as long as those of x, 3, got 2", {"y": torch.ones(4, 2)}),
    (ValueError, "y must be on the device of x, cpu, got meta", {"y": torch.ones(4, 3, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), ARGUMENTS, ids=[case[1] for case in ARGUMENTS])
@pytest.mark.parametrize("matrix", [pairwise_distance, pairwise_cosine])
def test_arguments(matrix: Matrix, error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error) as raised:
        matrix(**{"x": torch.ones(2, 3), **arguments})
    assert str(raised.value) == f"{matrix.__name__}: {message}"


def test_squared_is_a_bool() -> None:
    with pytest.raises(TypeError) as raised:
        pairwise_distance(torch.ones(2, 3), squared=2)
    assert str(raised.value) == "pairwise_distance: squared must be a bool, got int"


@pytest.mark.parametrize(
    ("matrix", "names"),
    [(pairwise_distance, "native, algebra, reference"), (pairwise_cosine, "algebra, reference")],
)
def test_impl_is_one_that_there_is(matrix: Matrix, names: str) -> None:
    message = f"{matrix.__name__}: impl must be one of {names}, got 'fast'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        matrix(torch.ones(2, 3), impl="fast")
