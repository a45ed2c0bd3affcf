"""Inputs that break the published code of dkd_loss and nkd_loss, each by name, for every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoupled_problems import evaluate
from logit_problems import STORAGE
from torch import Tensor

import fastkd
from fastkd import testing

INF, NAN = float("inf"), float("nan")
N, V = 4, 37
SOME = ("dkd", "nkd", "nkd_at_2")  # one for each way through the kernels
TARGET = torch.tensor([0, 5, 36, 20])
pytestmark = pytest.mark.few_interpreted(10)


def logits(seed: int) -> Tensor:
    return testing.flat_logits(N, V, seed=seed)


def judged(
    impl: str, case: str, student: Tensor, teacher: Tensor, target: Tensor = TARGET, **options: Any
) -> tuple[Tensor, Tensor]:
    """Within the bar of the float64 reference, infinities included, and with a bounded gradient."""
    got = evaluate(impl, case, student, teacher, target, **options)
    testing.assert_as_exact_as_fp32(
        got, lambda s, t: evaluate("reference", case, s, t, target, **options), student, teacher
    )
    assert bool(got[1].isfinite().all())
    return got


def at(x: Tensor, ids: Tensor, value: float) -> Tensor:
    return x.scatter(1, ids[:, None], value)


@pytest.mark.parametrize("gap", [200.0, 1e4])
@pytest.mark.parametrize("case", SOME)
def test_gaps(impl: str, case: str, gap: float) -> None:
    """The published dkd is inf at a gap of 200, with a gradient of NaN, and masks by -1000, which logits can reach."""
    student, teacher = logits(1), logits(2)
    rows = torch.arange(N)
    student[rows, TARGET] += torch.tensor([gap, -gap, gap, -gap])
    teacher[rows, TARGET] += torch.tensor([gap, gap, -gap, -gap])
    for moved in (0.0, 1e4):
        loss, grad = judged(impl, case, student + moved, teacher - moved)
        assert bool(loss.isfinite().all())
        assert float(grad.abs().max()) < 20


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_masked_vocabulary(impl: str, case: str, dtype: torch.dtype) -> None:
    """Ids at -inf on both sides weigh nothing: as if they had been cut off."""
    masked = (torch.arange(V) % 3 == 1) & ~torch.isin(torch.arange(V), TARGET)
    student, teacher = logits(1).to(dtype), logits(2).to(dtype)
    loss, grad = judged(impl, case, student.masked_fill(masked, -INF), teacher.masked_fill(masked, -INF))
    target = TARGET - (masked.cumsum(0))[TARGET]
    want, want_grad = evaluate("reference", case, student[:, ~masked].double(), teacher[:, ~masked].double(), target)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad[:, ~masked].double(), want_grad, rtol=4 * eps, atol=1e-5)
    assert bool((grad[:, masked] == 0).all())


@pytest.mark.parametrize("case", SOME)
def test_student_masked_where_the_teacher_is_not(impl: str, case: str) -> None:
    student = logits(1)
    student[1:, 7] = -INF
    loss, grad = judged(impl, case, student, logits(2))
    assert (loss == INF).tolist() == [False, True, True, True]
    assert float(grad[1:].abs().max()) > 1e-3


@pytest.mark.parametrize("case", SOME)
def test_teacher_masked_where_the_student_is_not(impl: str, case: str) -> None:
    teacher = logits(2)
    teacher[1:, 7] = -INF
    assert bool(judged(impl, case, logits(1), teacher)[0].isfinite().all())


@pytest.mark.parametrize("case", SOME)
def test_target_masked_by_the_student(impl: str, case: str) -> None:
    loss, grad = judged(impl, case, at(logits(1), TARGET, -INF), logits(2))
    assert bool((loss == INF).all())
    assert bool((grad[torch.arange(N), TARGET] < 0).all()), "it still asks for the target"


@pytest.mark.parametrize("case", SOME)
def test_target_masked_by_the_student_where_the_teacher_is_next_to_sure_of_the_others(impl: str, case: str) -> None:
    """The logits decide what is infinite: exp(-2000) is 0, and no probability of 0."""
    loss, _ = judged(impl, case, at(logits(1), TARGET, -INF), at(logits(2), TARGET, -8000.0))
    assert bool((loss == INF).all())


@pytest.mark.parametrize("case", SOME)
def test_target_masked_by_both_or_the_teacher(impl: str, case: str) -> None:
    teacher = at(logits(2), TARGET, -INF)
    for student in (logits(1), at(logits(1), TARGET, -INF)):
        loss, _ = judged(impl, case, student, teacher)
        assert bool(loss.isfinite().all())


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("side", ["teacher", "both", "student"])
def test_nothing_left_but_the_target(impl: str, case: str, side: str) -> None:
    student, teacher = logits(1), logits(2)
    alone = torch.ones(N, V, dtype=torch.bool).scatter(1, TARGET[:, None], False)
    alone[0] = False  # an ordinary row
    if side != "teacher":
        student = student.masked_fill(alone, -INF)
    if side != "student":
        teacher = teacher.masked_fill(alone, -INF)
    loss, grad = judged(impl, case, student, teacher)
    assert bool(loss[0].isfinite())
    if side == "student":
        assert bool((loss[1:] == INF).all())
    else:
        assert bool(loss[1:].isfinite().all())
        assert bool((loss[1:] == 0).all()) == (side == "both")
        assert bool((grad[1:] == 0).all()) == (side == "both")
    if side == "teacher":  # which says nothing of the others then
        silent = {"beta": 0.0} if case == "dkd" else {"gamma": 0.0}
        want, want_grad = evaluate(impl, case, student, teacher, TARGET, **silent)
        torch.testing.assert_close(loss[1:], want[1:])
        torch.testing.assert_close(grad[1:], want_grad[1:])


@pytest.mark.parametrize("case", SOME)
def test_one_class_is_certain(impl: str, case: str) -> None:
    loss, grad = judged(impl, case, torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([0]))
    assert float(loss) == float(grad) == 0


def test_two_classes_have_no_others(impl: str) -> None:
    student, teacher, target = torch.randn(5, 2), torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    of_all = fastkd.dkd_loss(student, teacher, target, temperature=2.0, impl=impl)
    torch.testing.assert_close(of_all, fastkd.kd_loss(student, teacher, temperature=2.0, impl=impl))
    assert float(fastkd.dkd_loss(student, teacher, target, alpha=0.0, impl=impl)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("case", SOME)
def test_teacher_equal_to_student(impl: str, case: str) -> None:
    student = testing.peaked_logits(N, V, seed=1)
    loss, grad = judged(impl, case, student, student.clone())
    if case == "dkd":
        assert float(loss.abs().max()) < 1e-4
        assert float(grad.abs().max()) < 1e-4


@pytest.mark.parametrize("case", SOME)
def test_constant_rows(impl: str, case: str) -> None:
    judged(impl, case, torch.full((N, V), 3.0), torch.full((N, V), -2.0))
    judged(impl, case, torch.full((N, V), 3.0), logits(2))


@pytest.mark.parametrize("case", [*SOME, "dkd_of_the_target", "dkd_of_the_others", "nkd_of_the_target"])
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("where", ["target", "other"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_unusable_row_is_nan_and_harms_no_other(impl: str, case: str, side: str, where: str, poison: float) -> None:
    student, teacher = logits(1), logits(2)
    clean = evaluate(impl, case, student, teacher, TARGET)
    (student if side == "student" else teacher)[2, 36 if where == "target" else 3] = poison
    loss, grad = evaluate(impl, case, student, teacher, TARGET)
    others = torch.tensor([0, 1, 3])
    assert bool(loss[2].isnan())
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_no_finite_logit_is_nan(impl: str, case: str, side: str) -> None:
    student, teacher = logits(1), logits(2)
    (student if side == "student" else teacher)[2] = -INF
    loss, grad = evaluate(impl, case, student, teacher, TARGET)
    assert loss.isnan().tolist() == [False, False, True, False]
    assert bool(grad[torch.tensor([0, 1, 3])].isfinite().all())


@pytest.mark.parametrize("case", SOME)
def test_rows_that_do_not_count_may_hold_anything(impl: str, case: str) -> None:
    student, teacher = logits(1), logits(2)
    target, weight = TARGET.clone(), torch.tensor([1.0, 1.0, 0.0, 2.0])
    target[1] = -100
    want, want_grad = evaluate(impl, case, student, teacher, TARGET, row_weight=weight)
    for poison in (NAN, INF, -INF):
        student[1:3], teacher[1:3] = poison, poison
        loss, grad = evaluate(impl, case, student, teacher, target, row_weight=weight)
        counts = torch.tensor([0, 3])
        assert not bool(loss[1:3].any())
        assert not bool(grad[1:3].any())
        assert torch.equal(loss[counts], want[counts])
        assert torch.equal(grad[counts], want_grad[counts])


def test_a_weight_of_0_silences_an_infinite_part(impl: str) -> None:
    others = logits(1)
    others[:, 7] = -INF
    judged(impl, "dkd_of_the_target", others, logits(2))
    loss, _ = judged(impl, "nkd_of_the_target", others, logits(2))
    assert bool(loss.isfinite().all())
    loss, _ = judged(impl, "dkd_of_the_others", at(logits(1), TARGET, -INF), logits(2))
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize("case", SOME)
def test_half_precision_at_its_limits(impl: str, case: str) -> None:
    student = torch.tensor([[6e4, -6e4, 0.0], [6e4, 6e4, 6e4]], dtype=torch.float16)
    teacher = torch.tensor([[-6e4, 6e4, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float16)
    for label in range(3):
        target = torch.full((2,), label)
        loss, _ = evaluate(impl, case, student, teacher, target)
        want, _ = evaluate("reference", case, student.double(), teacher.double(), target)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", SOME)
def test_masks_made_of_the_lowest_float(impl: str, case: str) -> None:
    student, teacher = logits(1), logits(2)
    student[:, 8:15] = teacher[:, 8:15] = torch.finfo(torch.float32).min
    loss, grad = evaluate(impl, case, student, teacher, TARGET)
    student[:, 8:15] = teacher[:, 8:15] = -INF
    want, want_grad = evaluate(impl, case, student, teacher, TARGET)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_no_row_that_counts(impl: str, case: str, reduction: str) -> None:
    op = "dkd_loss" if case == "dkd" else "nkd_loss"
    for n in (0, 3):
        student, teacher = torch.full((n, V), NAN, requires_grad=True), torch.full((n, V), NAN)
        loss = getattr(fastkd, op)(student, teacher, torch.full((n,), -100), reduction=reduction, impl=impl)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert not bool(loss.any())
        assert grad.shape == (n, V)
        assert not bool(grad.any())
