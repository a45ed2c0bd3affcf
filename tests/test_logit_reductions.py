"""Reductions, normalisers, parts, the module form, and cross_entropy without a teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from logit_problems import DIVERGENCES, STORAGE
from torch import Tensor

import fastkd
from fastkd.testing import assert_as_exact_as_fp32, peaked_logits

N, V = 6, 41


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.tensor([3, -100, 0, 40, -100, 7])
    weight = torch.tensor([1.0, 5.0, 0.0, 0.5, 1.0, 2.0])
    return peaked_logits(N, V, seed=1), peaked_logits(N, V, seed=2), target, weight


def loss_and_grad(
    impl: str, student: Tensor, teacher: Tensor, *args: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, *args, impl=impl, **options)  # type: ignore[arg-type]
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_a_reduced_loss_is_the_sum_of_its_rows(
    impl: str, reduction: str, dtype: torch.dtype, problem: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    student, teacher, target, weight = problem
    student, teacher = student.to(dtype), teacher.to(dtype)
    divisor = {"sum": 1.0, "mean": 1 + 0 + 0.5 + 2, "batchmean": float(N)}[reduction]
    options = {"row_weight": weight, "temperature": 2.0, "alpha": 0.3}
    got = loss_and_grad(impl, student, teacher, target, reduction=reduction, **options)

    def rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = loss_and_grad("reference", student, teacher, target, reduction="none", **options)
        return loss / divisor, grad / divisor

    assert_as_exact_as_fp32(got, rows, student, teacher)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizer_replaces_the_divisor(
    impl: str, reduction: str, as_tensor: bool, problem: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    student, teacher, target, weight = problem
    total, grad = loss_and_grad(impl, student, teacher, target, row_weight=weight, reduction="sum")
    normalizer = torch.tensor(12) if as_tensor else 12
    loss, got = loss_and_grad(
        impl, student, teacher, target, row_weight=weight, reduction=reduction, normalizer=normalizer
    )
    torch.testing.assert_close(loss, total / 12)
    torch.testing.assert_close(got, grad / 12)


@pytest.mark.parametrize(("shape", "dim"), [((2, 3, V), -1), ((2, V, 3, 4), 1)], ids=str)
def test_batchmean_divides_by_the_batch(impl: str, shape: tuple[int, ...], dim: int) -> None:
    """By the size of the first dimension, as in F.kl_div, not by the number of rows."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    total, grad = loss_and_grad(impl, student, teacher, dim=dim, reduction="sum")
    loss, got = loss_and_grad(impl, student, teacher, dim=dim, reduction="batchmean")
    torch.testing.assert_close(loss, total / 2)
    torch.testing.assert_close(got, grad / 2)


def test_accumulated_micro_batches_equal_the_batch(impl: str) -> None:
    """Gradient accumulation with one global normaliser: no mean of means."""
    student, teacher = peaked_logits(10, V, seed=1), peaked_logits(10, V, seed=2)
    target = (torch.arange(10) * 3).masked_fill(torch.arange(10) % 4 == 1, -100)
    count = (target != -100).sum()
    want_loss, want = loss_and_grad(impl, student, teacher, target)
    leaf, total = student.clone().requires_grad_(), 0.0
    for part in (slice(0, 3), slice(3, 4), slice(4, 10)):
        loss = fastkd.kd_loss(leaf[part], teacher[part], target[part], normalizer=count, impl=impl)
        loss.backward()
        total += loss.item()
    assert leaf.grad is not None
    assert total == pytest.approx(want_loss.item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("why", ["no_row", "all_ignored", "weights_0", "weights_cancel"])
def test_nothing_that_counts_is_0_with_zero_gradients(impl: str, reduction: str, why: str) -> None:
    n = 0 if why == "no_row" else 4
    student, teacher = torch.randn(n, V), torch.randn(n, V)
    target = torch.full((n,), -100 if why == "all_ignored" else 1)
    weight = {"weights_0": torch.zeros(n), "weights_cancel": torch.tensor([1.0, -1.0, 2.0, -2.0])}.get(
        why, torch.ones(n)
    )
    if why == "weights_cancel" and reduction != "mean":
        pytest.skip("only the mean divides by the weights")
    loss, grad = loss_and_grad(impl, student, teacher, target, row_weight=weight, reduction=reduction)
    assert loss.item() == 0
    assert bool((grad == 0).all())
    assert grad.shape == student.shape


def test_normalizer_of_0_is_0(impl: str) -> None:
    for normalizer in (0, torch.tensor(0.0)):
        loss, grad = loss_and_grad(impl, torch.randn(2, V), torch.randn(2, V), normalizer=normalizer)
        assert loss.item() == 0
        assert bool((grad == 0).all())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_parts(impl: str, reduction: str, problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    student, teacher, target, weight = problem
    student[3, 40] = 100.0  # here the student is right
    teacher[5] = student[5]  # and here it is of the teacher's opinion
    loss, parts = fastkd.kd_loss(
        student, teacher, target, row_weight=weight, alpha=0.3, temperature=2.0, reduction=reduction,
        return_parts=True, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(0.3 * parts.hard + 0.7 * parts.soft, loss)
    counts = (target != -100) & (weight != 0)
    assert torch.equal(parts.rows, counts.float() if reduction == "none" else counts.sum())
    best = student.argmax(-1)
    effective = torch.where(counts, weight, 0.0)
    divisor = {"none": 1.0, "sum": 1.0, "mean": effective.sum(), "batchmean": float(N)}[reduction]
    for got, agrees in (
        (parts.target_agreement, best == target),
        (parts.teacher_agreement, best == teacher.argmax(-1)),
    ):
        want = effective * agrees / divisor
        torch.testing.assert_close(got, want if reduction == "none" else want.sum())
        assert float(want.sum()) > 0
    assert not any(part.requires_grad for part in parts)


def test_parts_of_several_teachers_and_shared_vocab(impl: str) -> None:
    student = torch.tensor([[0.0, 9.0, 1.0, 20.0], [5.0, 0.0, 1.0, 2.0]])
    teachers = [torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.0, 1.0], [5.0, 0.0, 1.0]])]
    _, parts = fastkd.kd_loss(
        student, teachers, teacher_weight=(0.75, 0.25), shared_vocab=3, reduction="none", return_parts=True, impl=impl
    )
    assert parts.teacher_agreement.tolist() == [0.0, 1.0]  # the first row's best id is not shared
    assert parts.target_agreement.tolist() == [0.0, 0.0]
    assert parts.hard.tolist() == [0.0, 0.0]


def test_agreement_looks_at_the_shared_ids_alone(impl: str) -> None:
    """A teacher's row ends where it ends: what lies behind it in memory, and beyond the shared ids, is not its best."""
    wide = torch.full((2, V + 9), 50.0)
    wide[:, :V] = torch.randn(2, V)
    teacher = wide[:, :V]
    teacher[:, 7], teacher[:, V - 1] = 20.0, 30.0
    student = torch.randn(2, V + 9)
    student[0, 7], student[1, V - 1] = 40.0, 40.0
    _, parts = fastkd.kd_loss(student, teacher, shared_vocab=V - 1, reduction="none", return_parts=True, impl=impl)
    assert parts.teacher_agreement.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("far", [5, 3000])
def test_the_first_of_equals_is_the_best(impl: str, far: int) -> None:
    """As in argmax, within a tile and from one to another."""
    if impl == "triton" and not torch.cuda.is_available() and far > V:
        pytest.skip("interpreted: short rows")
    student, teacher = torch.zeros(1, far + 3), torch.zeros(1, far + 3)
    student[0, 3] = student[0, far] = 9.0
    teacher[0, 3], teacher[0, far] = 9.0, 8.0
    _, parts = fastkd.kd_loss(student, teacher, torch.tensor([3]), return_parts=True, impl=impl)
    assert parts.teacher_agreement == 1
    assert parts.target_agreement == 1


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_masks_beyond_the_shared_ids_are_no_mismatch(impl: str, divergence: str) -> None:
    student, teacher = torch.randn(1, V), torch.randn(1, V)
    masked, other = (student, teacher) if divergence == "forward_kl" else (teacher, student)
    masked[0, V - 2 :] = -torch.inf
    masked[0, 2] = other[0, 2] = -torch.inf  # both: looked at, and no mismatch
    loss = fastkd.kd_loss(student, teacher, divergence=divergence, shared_vocab=V - 2, impl=impl)
    assert loss.isfinite()


def test_rows_without_a_label_take_alpha_0(impl: str) -> None:
    student, teacher = peaked_logits(4, V, seed=1), peaked_logits(4, V, seed=2)
    target = torch.tensor([5, 0, 9, 0])
    alpha = torch.tensor([0.4, 0.0, 0.4, 0.0])
    rows, _ = loss_and_grad(impl, student, teacher, target, alpha=alpha, reduction="none")
    soft, _ = loss_and_grad(impl, student, teacher, reduction="none")
    both, _ = loss_and_grad(impl, student, teacher, target, alpha=0.4, reduction="none")
    torch.testing.assert_close(rows, torch.where(alpha == 0, soft, both))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_torchs(impl: str, reduction: str, smoothing: float) -> None:
    student = peaked_logits(N, V, seed=1).requires_grad_()
    target = torch.tensor([3, -1, 0, 40, -1, 7])
    want = F.cross_entropy(student, target, reduction=reduction, label_smoothing=smoothing, ignore_index=-1)
    got = fastkd.cross_entropy(
        student, target, reduction=reduction, label_smoothing=smoothing, ignore_index=-1, impl=impl
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (want_grad,) = torch.autograd.grad(want.sum(), student)
    (got_grad,) = torch.autograd.grad(got.sum(), student)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_maps(impl: str) -> None:
    student, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    torch.testing.assert_close(
        fastkd.cross_entropy(student, target, dim=1, impl=impl), F.cross_entropy(student, target)
    )


def test_a_single_row_without_dimensions(impl: str) -> None:
    student, teacher = torch.randn(V), torch.randn(V)
    loss, grad = loss_and_grad(impl, student, teacher, torch.tensor(3), reduction="none")
    want, want_grad = loss_and_grad(impl, student[None], teacher[None], torch.tensor([3]), reduction="none")
    assert loss.shape == ()
    assert torch.equal(loss, want[0])
    assert torch.equal(grad, want_grad[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_forward_feeds_anothers_backward(impl: str, divergence: str) -> None:
    """The state means the same everywhere."""
    from fastkd._dispatch import _module
    from fastkd._rows import LogitRows

    temperatures = (1.0, 1.0, 1.0) if divergence == "mse" else (2.0, 1.0, 2.0)
    rows = LogitRows(
        student=peaked_logits(3, V, seed=1), teachers=(peaked_logits(3, V, seed=2),) * 2,
        target=torch.tensor([1, -100, 4]), row_weight=None, alpha=0.3,
        temperature=temperatures[0], teacher_temperature=temperatures[1:], teacher_weight=(0.5, 1.0), divisor=None,
        divergence=divergence, beta=0.3, scale_by_t2=True, label_smoothing=0.1, z_loss=0.01,
        ignore_index=-100, shared=V - 2, reduce=True, agreement=True, overwrite=False,
    )  # fmt: skip
    here, there = _module(impl, "logit"), _module("reference", "logit")
    loss, state, scale = here.forward(rows)
    want_loss, want_state, want_scale = there.forward(rows)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)
    upstream = torch.tensor(1.3)
    want = there.backward(rows, want_state, want_scale, upstream)
    torch.testing.assert_close(there.backward(rows, state, scale, upstream), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(here.backward(rows, want_state, want_scale, upstream), want, rtol=1e-4, atol=1e-6)


def test_module_holds_the_options() -> None:
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    criterion = fastkd.KDLoss(divergence="jsd", beta=0.3, temperature=2.0)
    want = fastkd.kd_loss(student, teacher, divergence="jsd", beta=0.3, temperature=2.0, reduction="sum")
    assert torch.equal(criterion(student, teacher, reduction="sum"), want)
    assert "beta=0.3" in repr(criterion)
    with pytest.raises(TypeError, match="KDLoss: temprature must be a keyword argument of kd_loss"):
        fastkd.KDLoss(temprature=2.0)  # type: ignore[call-arg]
