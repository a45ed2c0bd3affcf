"""Features against features: every implementation against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from feature_problems import ADVERSARIAL, call, flat, judge
from torch import Tensor

import fastkd

IMPLEMENTATIONS = ("reference", "native")
DISTANCES = ("mse", "l1", "huber", "cosine")


def naive(distance: str, student: Tensor, teacher: Tensor, mask: Tensor | None = None, delta: float = 1.0) -> Tensor:
    if mask is not None:
        student, teacher = (x[mask.expand(x.shape)] for x in (student, teacher))
    difference = student - teacher
    if distance == "mse":
        each = difference * difference
    elif distance == "l1":
        each = difference * difference.sign()
    else:
        size = difference.abs()
        each = torch.where(size <= delta, difference**2 / 2, delta * (size - delta / 2))
    return each.sum() / max(1, each.numel())


def naive_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Of rows that are not zero."""
    there = (student.detach().norm(dim=-1) > 1e-12) & (teacher.norm(dim=-1) > 1e-12)
    s, t = student[there], teacher[there]
    cosines = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    return 1 - cosines.sum() / max(1, there.numel()) if there.numel() else 0 * student.sum()


@pytest.mark.parametrize("shape", [(13, 7), (3, 5, 17), (2, 3, 4, 5), (70, 300), (1,), (0, 4)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_gradient(impl: str, distance: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    options = {"delta": 0.7} if distance == "huber" else {}
    if distance == "cosine":
        judge(fastkd.hint_loss, naive_cosine, student, teacher, impl=impl, distance=distance)
    else:
        formula = lambda s, t: naive(distance, s, t, **options)  # noqa: E731
        judge(fastkd.hint_loss, formula, student, teacher, impl=impl, distance=distance, **options)
    if student.numel() > 1:
        assert call(fastkd.hint_loss, student, teacher, impl=impl, distance=distance)[1].abs().max() > 1e-5


@pytest.mark.parametrize("distance", ["mse", "l1", "huber"])
def test_one_number(impl: str, distance: str) -> None:
    value, grad = call(fastkd.hint_loss, torch.tensor(1.5), torch.tensor(-1.0), distance=distance, impl=impl)
    want, slopes = call(fastkd.hint_loss, torch.tensor([1.5]), torch.tensor([-1.0]), distance=distance, impl=impl)
    assert value == want > 0
    assert grad.shape == ()
    assert grad == slopes[0] > 0


@pytest.mark.parametrize("distance", ["mse", "l1", "huber"])
def test_no_elements(impl: str, distance: str) -> None:
    value, grad = call(fastkd.hint_loss, torch.zeros(3, 0), torch.zeros(3, 0), distance=distance, impl=impl)
    assert value == 0
    assert grad.shape == (3, 0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_features_that_can_fail(impl: str, problem: str, distance: str) -> None:
    student, _ = ADVERSARIAL[problem]()
    for teacher in (flat(*student.shape, seed=1), student.clone(), torch.zeros_like(student)):
        value, grad = call(fastkd.hint_loss, student, teacher, impl=impl, distance=distance)
        assert value.isfinite()
        assert grad.isfinite().all()
        formula = naive_cosine if distance == "cosine" else lambda s, t: naive(distance, s, t)
        judge(fastkd.hint_loss, formula, student, teacher, impl=impl, distance=distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_dtypes(impl: str, distance: str, dtypes: tuple[str, str]) -> None:
    student, teacher = flat(9, 37).to(getattr(torch, dtypes[0])), flat(9, 37, 1).to(getattr(torch, dtypes[1]))
    formula = naive_cosine if distance == "cosine" else lambda s, t: naive(distance, s, t)
    judge(fastkd.hint_loss, formula, student, teacher, impl=impl, distance=distance)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance: str) -> None:
    student, teacher = flat(5, 4).double().requires_grad_(), flat(5, 4, 1).double()
    assert torch.autograd.gradcheck(lambda s: fastkd.hint_loss(s, teacher, distance=distance), (student,))


MASKS = {
    "elements": torch.tensor([0, 1, 1, 0, 1, 0, 0, 1] * 30).bool().view(4, 5, 12),
    "tokens": torch.tensor([1, 0, 0, 1, 1] * 4).bool().view(4, 5, 1),
    "positions": torch.tensor([0, 1, 0, 1, 1]).bool().view(5, 1),
    "columns": torch.arange(12) % 3 > 0,
    "number": torch.tensor(True),
}


# Of a row of cosine all counts or nothing.
MASKED = [(d, m) for d in DISTANCES for m in MASKS if d != "cosine" or m not in ("elements", "columns")]


@pytest.mark.parametrize(("distance", "mask"), MASKED)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mask(impl: str, distance: str, mask: str, reduction: str) -> None:
    """What does not count may hold anything, and gets nothing."""
    counts = MASKS[mask]
    everywhere = counts.expand(4, 5, 12)
    student, teacher = flat(20, 12).view(4, 5, 12), flat(20, 12, 1).view(4, 5, 12)
    if distance == "cosine":
        rows = everywhere[..., 0]
        factor = int(rows.sum()) if reduction == "sum" else 1
        formula = lambda s, t: factor * naive_cosine(s[rows], t[rows])  # noqa: E731
    else:
        factor = int(everywhere.sum()) if reduction == "sum" else 1
        formula = lambda s, t: factor * naive(distance, s, t, counts)  # noqa: E731
    options = {"distance": distance, "reduction": reduction, "impl": impl, "mask": counts}
    judge(fastkd.hint_loss, formula, student, teacher, **options)
    clean = call(fastkd.hint_loss, student, teacher, **options)
    for side in (student, teacher):
        side[~everywhere] = float("nan")
    value, grad = call(fastkd.hint_loss, student, teacher, **options)
    assert torch.equal(value, clean[0])
    assert torch.equal(grad, clean[1])
    assert (grad[~everywhere] == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_teacher_and_mask_of_inference_mode(impl: str, distance: str) -> None:
    student, teacher, mask = flat(9, 5), flat(9, 5, 1), torch.arange(9)[:, None] % 3 > 0
    with torch.inference_mode():
        inside, inside_mask = teacher.clone(), mask.clone()
    for options, others in (({}, {}), ({"mask": inside_mask}, {"mask": mask})):
        got = call(fastkd.hint_loss, student, inside, distance=distance, impl=impl, **options)
        want = call(fastkd.hint_loss, student, teacher, distance=distance, impl=impl, **others)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("distance", ["mse", "l1", "huber"])
def test_mask_of_several_tiles(impl: str, distance: str) -> None:
    student, teacher, mask = flat(70, 300), flat(70, 300, 1), flat(70, 300, 2) > 0.2
    formula = lambda s, t: naive(distance, s, t, mask)  # noqa: E731
    judge(fastkd.hint_loss, formula, student, teacher, impl=impl, distance=distance, mask=mask)
    student[~mask] = float("inf")
    value, grad = call(fastkd.hint_loss, student, teacher, impl=impl, distance=distance, mask=mask)
    assert value.isfinite()
    assert torch.equal(grad == 0, ~mask)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(impl: str, distance: str, reduction: str) -> None:
    student = torch.full((3, 4), float("nan"))
    mask = torch.zeros(3, 1, dtype=torch.bool)
    value, grad = call(
        fastkd.hint_loss, student, student.clone(), distance=distance, reduction=reduction, mask=mask, impl=impl
    )
    assert value == 0
    assert (grad == 0).all()


def test_zero_rows_of_cosine(impl: str) -> None:
    """Distance 1 and gradient 0, on either side, and where rows have no elements."""
    student, teacher = flat(4, 6), flat(4, 6, 1)
    student[0], teacher[1], student[2], teacher[2] = 1e-13 * student[0], 0, 0, 0
    value, grad = call(fastkd.hint_loss, student, teacher, distance="cosine", reduction="sum", impl=impl)
    (cosine,) = torch.cosine_similarity(student[3:], teacher[3:])
    torch.testing.assert_close(value, 4 - cosine)
    assert (grad[:3] == 0).all()
    assert (grad[3] != 0).all()
    empty = torch.zeros(3, 0)
    assert fastkd.hint_loss(empty, empty, distance="cosine", impl=impl) == 1
    assert (
        fastkd.hint_loss(empty, empty, distance="cosine", mask=torch.tensor([[True], [False], [True]]), impl=impl) == 1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_are_no_floats(impl: str, dtype: torch.dtype) -> None:
    student, teacher = (1e30 * flat(5, 70)).to(dtype), (1e25 * flat(5, 70, 1)).to(dtype)
    value, grad = call(fastkd.hint_loss, student, teacher, distance="cosine", impl=impl)
    want, slope = call(fastkd.hint_loss, student.double() / 1e30, teacher.double() / 1e30, distance="cosine")
    torch.testing.assert_close(value, want, check_dtype=False, rtol=1e-6, atol=0)
    torch.testing.assert_close(1e30 * grad.double(), slope, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-8)


@pytest.mark.parametrize("distance", DISTANCES)
def test_not_a_number_is_not_hidden(impl: str, distance: str) -> None:
    for side in (0, 1):
        for bad in ("nan", "inf"):
            pair = [flat(9, 70), flat(9, 70, 1)]
            pair[side][3, 69] = float(bad)
            assert not fastkd.hint_loss(pair[0], pair[1], distance=distance, impl=impl).isfinite()


@pytest.mark.parametrize("distance", DISTANCES)
def test_layouts(impl: str, distance: str) -> None:
    student, teacher = torch.randn(3, 8, 5, 6), torch.randn(3, 8, 5, 6)
    mask = torch.rand(3, 8, 5, 1) > 0.5
    want = call(fastkd.hint_loss, student, teacher, distance=distance, mask=mask, impl=impl)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], -1)[..., 1],
    ):
        for pair in ((layout(student), layout(teacher)), (student, layout(teacher))):
            got = call(fastkd.hint_loss, *pair, distance=distance, mask=mask, impl=impl)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    expanded = call(fastkd.hint_loss, student, teacher[:1].expand(3, 8, 5, 6), distance=distance, impl=impl)
    whole = call(fastkd.hint_loss, student, teacher[:1].expand(3, 8, 5, 6).contiguous(), distance=distance, impl=impl)
    assert torch.equal(expanded[0], whole[0])
    assert torch.equal(expanded[1], whole[1])


@pytest.mark.native
@pytest.mark.parametrize("distance", DISTANCES)
def test_threads_do_not_change_the_sum(distance: str) -> None:
    student, teacher = torch.randn(300, 400), torch.randn(300, 400)
    one = call(fastkd.hint_loss, student, teacher, distance=distance, impl="native")
    torch.set_num_threads(2)
    two = call(fastkd.hint_loss, student, teacher, distance=distance, impl="native")
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
