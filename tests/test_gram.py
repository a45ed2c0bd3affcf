"""Losses of inner products: every implementation against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from feature_problems import ADVERSARIAL, call, flat, judge
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import _gram, _widen

IMPLEMENTATIONS = ("reference", "algebra", "native")
ANYWHERE = ("reference", "algebra")
SHAPES = [(13, 7, 5), (13, 3, 3), (5, 40, 3), (6, 2, 30), (6, 6, 6), (2, 1, 1), (1, 3, 3), (0, 3, 3)]


def naive_gram(student: Tensor, teacher: Tensor) -> Tensor:
    difference = student @ student.T - teacher @ teacher.T
    return difference.square().sum() / max(1, len(student)) ** 2


def normalised(rows: Tensor, p: float = 2.0) -> Tensor:
    """Short rows are left out, and so is the gradient that F.normalize has there, 1e12."""
    there = rows.detach().norm(p=p, dim=1) > 1e-12
    return torch.zeros_like(rows).index_put((there,), F.normalize(rows[there], p=p, dim=1))


def naive_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return naive_gram(normalised(student), normalised(teacher))


def naive_similarity(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    g, h = normalised(student @ student.T, p), normalised(teacher @ teacher.T, p)
    return (g - h).square().sum() / max(1, len(student)) ** 2


def naive_cka(student: Tensor, teacher: Tensor) -> Tensor:
    # Not from the raw features: at an offset even float64 would lose what is left after centring.
    centring = torch.eye(len(student)).to(student) - 1 / max(1, len(student))
    s, t = centring @ (student - student[:1].detach()), centring @ (teacher - teacher[:1])
    g, h = s @ s.T, t @ t.T
    if len(student) < 2 or float(g.detach().norm() * h.norm()) < 1e-20:
        return 1 + 0 * student.sum()
    return 1 - (g * h).sum() / (g.norm() * h.norm())


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gram": (fastkd.gram_loss, naive_gram),
    "cosine": (fastkd.cosine_relation_loss, naive_cosine),
    "similarity": (fastkd.similarity_preserving_loss, naive_similarity),
    "similarity, l1": (partial(fastkd.similarity_preserving_loss, norm="l1"), partial(naive_similarity, p=1.0)),
    "cka": (fastkd.cka_loss, naive_cka),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(impl: str, shape: tuple[int, int, int], name: str) -> None:
    n, d, d_teacher = shape
    loss, naive = LOSSES[name]
    student, teacher = flat(n, d), flat(n, d_teacher, 1)
    judge(loss, naive, student, teacher, impl=impl)
    if n > 2:
        assert call(loss, student, teacher, impl=impl)[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_features_that_can_fail(impl: str, problem: str, name: str) -> None:
    loss, naive = LOSSES[name]
    student, teacher = ADVERSARIAL[problem]()
    value, grad = call(loss, student, teacher, impl=impl)
    assert value.isfinite()
    assert grad.isfinite().all()
    judge(loss, naive, student, teacher, impl=impl)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "gram"])
@pytest.mark.parametrize("shape", [(11, 6, 5), (5, 9, 8)])
@pytest.mark.parametrize("factors", [(1e15, 1.0), (1.0, 1e15), (1e-10, 1e-11), (1e15, 1e-11)])
def test_losses_that_do_not_notice_a_scale(
    impl: str, factors: tuple[float, float], shape: tuple[int, int, int], name: str
) -> None:
    """Though products of four features are neither float32 then, nor inner products as long as a row has to be."""
    n, d, d_teacher = shape
    loss, (student, teacher) = LOSSES[name][0], (flat(n, d), flat(n, d_teacher, 1))
    least = 1e-5 if name.startswith("similarity") else 0.0
    own, other = (max(factor, least) for factor in factors)
    value, grad = call(loss, student, teacher, impl=impl)
    got, slope = call(loss, own * student, other * teacher, impl=impl)
    torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope * own, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(impl: str, dtype: torch.dtype, name: str) -> None:
    loss, naive = LOSSES[name]
    for other in (dtype, torch.float32):
        student, teacher = flat(11, 6).to(dtype), flat(11, 4, 1).to(other)
        judge(loss, naive, student, teacher, impl=impl)
        value = loss(student, teacher, impl=impl)
        assert value.dtype is torch.float32


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("by", ANYWHERE)
def test_float64(by: str, name: str) -> None:
    loss, naive = LOSSES[name]
    for other in (torch.float64, torch.float32):
        student, teacher = flat(11, 6).double(), flat(11, 4, 1).to(other)
        judge(loss, naive, student, teacher, impl=by)
        assert loss(student, teacher, impl=by).dtype is torch.float64


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("by", ANYWHERE)
def test_gradcheck(by: str, name: str) -> None:
    for d in (3, 20):
        student, teacher = flat(8, d).double().requires_grad_(), flat(8, 4, 1).double()
        loss = LOSSES[name][0]
        assert torch.autograd.gradcheck(lambda s, t=teacher, f=loss: f(s, t, impl=by), (student,))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cka"])
def test_sum(impl: str, name: str) -> None:
    loss, naive = LOSSES[name]
    student, teacher = flat(9, 4), flat(9, 5, 1)
    judge(loss, lambda s, t: 81 * naive(s, t), student, teacher, impl=impl, reduction="sum")


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_of_rows(impl: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last is not whole."""
    monkeypatch.setattr(_widen, "CHUNK", 4 * 6)
    monkeypatch.setattr(_gram, "TILE", 3 * 11)
    loss, naive = LOSSES[name]
    judge(loss, naive, flat(11, 6), flat(11, 5, 1), impl=impl)
    judge(loss, naive, flat(11, 12), flat(11, 5, 1), impl=impl)


def nearly_equal_relations(sigma: float, n: int = 512, d: int = 16) -> tuple[Tensor, Tensor]:
    """The teacher is the student turned, and a little noise."""
    student = flat(n, d).double()
    turn = torch.linalg.qr(flat(d, d, 1).double()).Q
    return student.float(), (student @ turn + sigma * flat(n, d, 2)).float()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "similarity, l1"])
def test_relations_that_are_nearly_equal(impl: str, name: str) -> None:
    """The D x D form subtracts numbers 5e7 times the loss: in float32 nothing would be left."""
    loss, naive = LOSSES[name]
    student, teacher = nearly_equal_relations(1e-4)
    exact = float(naive(student.double(), teacher.double()))
    largest = float((student.double() @ student.double().T).square().mean())
    if name == "gram":
        assert 1e-9 < exact / largest < 4e-8
    judge(loss, naive, student, teacher, impl=impl)
    if impl != "reference":
        assert float(loss(student, teacher, impl=impl)) == pytest.approx(exact, rel=1e-5 if name == "gram" else 1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_rotation_and_offset(impl: str, name: str) -> None:
    """Equal relations: the loss is 0, never below, and so is the gradient."""
    student, teacher = nearly_equal_relations(0.0, 64, 8)
    value, grad = call(LOSSES[name][0], student, teacher, impl=impl)
    assert 0 <= float(value) < 1e-6
    assert grad.abs().max() < 1e-6
    if name == "cka":
        value, grad = call(LOSSES[name][0], student + 8, 3 * teacher - 2, impl=impl)
        assert 0 <= float(value) < 1e-6


def test_short_rows_count_as_zero(impl: str) -> None:
    student, teacher = flat(9, 4), flat(9, 3, 1)
    zeros = student.clone()
    student[2], student[5], zeros[2], zeros[5] = 1e-15 * student[2], 0, 0, 0
    for name in ("cosine", "similarity"):  # in l1 a product of 0 is a kink
        loss = LOSSES[name][0]
        value, grad = call(loss, student, teacher, impl=impl)
        expected, at_zero = call(loss, zeros, teacher, impl=impl)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, at_zero)
        if name == "cosine":
            assert (grad[[2, 5]] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_bounded_gradient_near_zero_rows(impl: str, name: str) -> None:
    """1 / |s| grows no further than the threshold lets it."""
    student, teacher = flat(9, 4), flat(9, 3, 1)
    for size in (1e-4, 1e-8, 1e-13, 1e-30):
        student[4] = size * flat(1, 4, 5)[0]
        value, grad = call(LOSSES[name][0], student, teacher, impl=impl)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert grad.abs().max() < 4 / max(size, 1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_not_hidden(impl: str, name: str, d: int, bad: float) -> None:
    for side in (0, 1):
        pair = [flat(9, d), flat(9, d, 1)]
        pair[side][3, 1] = bad
        assert not LOSSES[name][0](*pair, impl=impl).isfinite()


@pytest.mark.parametrize("shape", [(9, 4), (9, 40), (1, 4), (0, 4)])
def test_cka_of_a_constant(impl: str, shape: tuple[int, int]) -> None:
    for student, teacher in (
        (torch.full(shape, 0.1), flat(*shape)),
        (flat(*shape), torch.full(shape, 1e4 / 3)),
        (torch.zeros(shape), torch.zeros(shape)),
    ):
        value, grad = call(fastkd.cka_loss, student, teacher, impl=impl)
        assert value == 1
        assert (grad == 0).all()


@pytest.mark.parametrize("by", ANYWHERE)
def test_cka_of_a_constant_in_float64(by: str) -> None:
    value, grad = call(fastkd.cka_loss, torch.full((9, 4), 0.1).double(), flat(9, 4), impl=by)
    assert value == 1
    assert (grad == 0).all()


class Largest(TorchDispatchMode):
    """The most elements that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "similarity, l1"])
def test_no_matrix_of_all_pairs_where_rows_are_short(name: str) -> None:
    student, teacher = flat(200, 6), flat(200, 9, 1)
    with Largest() as largest:
        call(LOSSES[name][0], student, teacher)
    assert largest.numel == 200 * 9
    with Largest() as largest:
        call(LOSSES[name][0], student, teacher, impl="reference")
    assert largest.numel == 200**2


def test_no_matrix_of_all_pairs_in_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gram, "TILE", 4000)
    with Largest() as largest:
        call(LOSSES["similarity, l1"][0], flat(200, 6), flat(200, 9, 1))
    assert largest.numel == 4000
