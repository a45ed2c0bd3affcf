"""Distances and angles: every implementation against the published formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from feature_problems import call, flat, judge
from pair_problems import ADVERSARIAL, naive_angle, naive_distance
from torch import Tensor

import fastkd

IMPLEMENTATIONS = ("reference", "algebra", "native")
LOSSES = {"distance": (fastkd.rkd_distance_loss, naive_distance), "angle": (fastkd.rkd_angle_loss, naive_angle)}
# N, D and the teacher's D: both sides of the edges of tiles and of vectors.
SHAPES = [
    (2, 3, 4),
    (3, 2, 2),
    (7, 8, 5),
    (8, 16, 3),
    (9, 5, 6),
    (15, 3, 7),
    (16, 4, 4),
    (17, 9, 2),
    (31, 6, 5),
    (33, 7, 3),
]

Loss = Callable[..., Tensor]
each_loss = pytest.mark.parametrize(("loss", "naive"), LOSSES.values(), ids=LOSSES)


@each_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(impl: str, loss: Loss, naive: Loss, shape: tuple[int, int, int]) -> None:
    n, d, d_teacher = shape
    student, teacher = flat(n, d), flat(n, d_teacher, 1)
    judge(loss, naive, student, teacher, impl=impl)
    if n > 2:
        assert call(loss, student, teacher, impl=impl)[1].abs().max() > 1e-4


@each_loss
def test_larger(loss: Loss, naive: Loss) -> None:
    """More than one block of rows, of columns and of pairs."""
    for n, d in ((65, 19), (100, 530)):
        student, teacher = flat(n, d).double(), flat(n, 11, 1).double()
        exact, slope = call(naive, student, teacher)
        for impl in ("algebra", "native"):
            got, grad = call(loss, student.float(), teacher.float(), impl=impl)
            torch.testing.assert_close(got.double(), exact, rtol=1e-7, atol=0)
            torch.testing.assert_close(grad.double(), slope, rtol=1e-6, atol=float(1e-7 * slope.abs().max()))


@each_loss
@pytest.mark.parametrize(
    "options", [{"delta": 0.1}, {"normalize_rows": True}, {"reduction": "sum", "delta": 0.5}], ids=str
)
def test_options(impl: str, loss: Loss, naive: Loss, options: dict[str, Any]) -> None:
    student, teacher = flat(12, 5), flat(12, 6, 1)
    judge(partial(loss, **options), partial(naive, **options), student, teacher, impl=impl)
    plain, other = (call(loss, student, teacher, impl=impl, **one)[0] for one in ({}, options))
    assert abs(plain - other) > 0.05 * plain


def bound(student: Tensor) -> float:
    n = len(student)
    rms = torch.pdist(student.double()).square().mean().sqrt() if n > 1 else torch.zeros(())
    return float(1e6 / (n * rms)) if rms > 0 else 0.0


@each_loss
@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_adversarial(impl: str, loss: Loss, naive: Loss, problem: str) -> None:
    student, teacher = ADVERSARIAL[problem]()
    value, grad = call(loss, student, teacher, impl=impl)
    assert value.isfinite()
    assert grad.isfinite().all()
    if len(student):
        assert grad.abs().max() <= bound(student)
    judge(loss, naive, student, teacher, impl=impl)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(impl: str, loss: Loss, naive: Loss, dtype: torch.dtype) -> None:
    student, teacher = flat(10, 6).to(dtype), flat(10, 5, 1).to(dtype)
    judge(loss, naive, student, teacher, impl=impl)


@each_loss
def test_normalized_rows_that_are_short_count_as_zero(impl: str, loss: Loss, naive: Loss) -> None:
    student, teacher = flat(6, 3), flat(6, 4, 1)
    student[1] *= 1e-13
    student[2], teacher[3], teacher[4] = 0, 0, 1e-20
    value, grad = call(loss, student, teacher, normalize_rows=True, impl=impl)
    student[1], teacher[4] = 0, 0
    assert torch.equal(value, call(loss, student, teacher, normalize_rows=True, impl=impl)[0])
    assert grad.isfinite().all()
    assert (grad[1:3] == 0).all()
    assert (grad[3:] != 0).any(-1).all()


@each_loss
def test_scale_and_offset_change_nothing(impl: str, loss: Loss, naive: Loss) -> None:
    student, teacher = flat(9, 4).bfloat16().float(), flat(9, 5, 1)
    value, grad = call(loss, student, teacher, impl=impl)
    for scale in (2.0**-90, 2.0**90):
        scaled, slope = call(loss, student * scale, teacher, impl=impl)
        torch.testing.assert_close(scaled, value, rtol=1e-6, atol=0)
        torch.testing.assert_close(slope * scale, grad, rtol=1e-4, atol=1e-7)
    moved, slope = call(loss, student + 1024, teacher, impl=impl)
    if impl != "reference":
        assert abs(moved - call(loss, (student + 1024).double() - 1024, teacher)[0]) < 1e-7
        assert slope.sum(0).abs().max() < 1e-6


@each_loss
def test_gradcheck(loss: Loss, naive: Loss) -> None:
    for impl in ("reference", "algebra"):
        for options in ({}, {"normalize_rows": True}):
            student, teacher = flat(6, 3).double().requires_grad_(), flat(6, 4, 1).double()
            formula = partial(loss, teacher=teacher, impl=impl, **options)
            assert torch.autograd.gradcheck(formula, (student,))


@each_loss
def test_layouts(impl: str, loss: Loss, naive: Loss) -> None:
    student, teacher = flat(14, 10), flat(14, 8, 1)
    strided = student.T.contiguous().T
    every_other = torch.zeros(14, 20)[:, ::2].copy_(student)
    assert not strided.is_contiguous()
    value, grad = call(loss, student, teacher, impl=impl)
    for other in (strided, every_other):
        got, slope = call(loss, other, teacher.T.contiguous().T, impl=impl)
        if impl == "reference":  # the order of torch's sums follows the strides
            torch.testing.assert_close((got, slope), (value, grad))
        else:
            assert torch.equal(got, value)
            assert torch.equal(slope, grad)
    same = student[:1].expand(14, -1)
    assert call(loss, same, teacher, impl=impl)[0].isfinite()


@each_loss
def test_a_prepared_teacher_is_measured_once(impl: str, loss: Loss, naive: Loss) -> None:
    student, teacher = flat(8, 5), flat(8, 3, 1)
    if impl == "reference":
        taught = fastkd.prepare_teacher(teacher)
        assert torch.equal(loss(student, taught, impl=impl), loss(student, teacher, impl=impl))
        return
    taught = fastkd.prepare_teacher(teacher)
    want = {rows: loss(student, teacher, normalize_rows=rows, impl=impl) for rows in (False, True)}
    for _ in range(2):
        for rows in (False, True):
            assert torch.equal(loss(student, taught, normalize_rows=rows, impl=impl), want[rows])
        narrow = "_of_floats" if impl == "native" and loss is fastkd.rkd_distance_loss else ""
        assert sorted(taught.kept) == [f"squared_distances{narrow}", "squared_distances_of_unit_rows"]
    kept = dict(taught.kept)
    other = fastkd.rkd_angle_loss if loss is fastkd.rkd_distance_loss else fastkd.rkd_distance_loss
    other(student, taught, impl=impl)
    assert all(taught.kept[name] is matrix for name, matrix in kept.items())


@each_loss
def test_one_row_of_nan_gives_nan(impl: str, loss: Loss, naive: Loss) -> None:
    for side in (0, 1):
        for value in (float("nan"), float("inf")):
            pair = [flat(6, 3), flat(6, 4, 1)]
            pair[side][2, 1] = value
            assert loss(*pair, impl=impl).isnan()


@each_loss
def test_the_range_of_float32(impl: str, loss: Loss, naive: Loss) -> None:
    """Rows whose differences have squares that float32 has not, beside a column that does not change."""
    student, teacher = flat(9, 4), flat(9, 5, 1)
    student[:, 0] = 1
    value, grad = call(loss, student, teacher, impl=impl)
    for scale, constant in ((1e-25, 1.0), (1e-38, 0.0), (1e30, 1.0), (6e37, 0.0), (1e-20, 1e20)):
        scaled = student * scale
        scaled[:, 0] = constant
        got, slope = call(loss, scaled, teacher, impl=impl)
        torch.testing.assert_close(got, value, rtol=1e-5, atol=0)
        torch.testing.assert_close(slope.double() * scale, grad.double(), rtol=1e-4, atol=1e-7)
