"""A teacher of k ids a row: every tail and divergence against plain code over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logit_problems import STORAGE
from sparse_problems import INF, OPTIONS, PAIRS, RECORDED, TAKES, evaluate, known, labels, plain
from torch import Tensor

import fastkd
from fastkd import TopK
from fastkd.testing import assert_as_exact_as_fp32, flat_logits, peaked_logits

STORED = [(a, b) for a in STORAGE for b in STORAGE]
pytestmark = pytest.mark.few_interpreted(41)  # its kernels have tests of their own
BY_TAIL = pytest.mark.parametrize("tail", TAKES)


def interpreted(impl: str) -> bool:
    return impl == "triton" and not torch.cuda.is_available()


def check(impl: str, student: Tensor, teacher: TopK, **options: Any) -> tuple[Tensor, Tensor]:
    got = evaluate(impl, student, teacher, **options)
    assert got[1].dtype is student.dtype
    options.setdefault("divergence", "forward_kl")
    # The kernels' slopes of skew_kl have a multiple of q in them, which cancels: to a rounding of q.
    near = 2.0**-22 * student.double().softmax(-1) if options["divergence"] == "skew_kl" else 0.0
    compute = plain(teacher, **options)
    assert_as_exact_as_fp32(got, compute, student, teacher.log_probs, copies=4, slack=(0.0, near))
    return got


@pytest.mark.parametrize(("tail", "divergence"), PAIRS)
def test_exact(impl: str, tail: str, divergence: str) -> None:
    """Storage takes turns, and so do the options."""
    n, v, k = (3, 41, 8) if interpreted(impl) else (4, 203, 40)
    turn = PAIRS.index((tail, divergence))
    for i, (option, make) in enumerate(OPTIONS.items()):
        every = 1 if divergence in ("forward_kl", "reverse_kl") else 2
        if (turn + i) % (6 if interpreted(impl) else every):
            continue
        storage, recorded = STORED[(turn + i) % len(STORED)]
        logits = (peaked_logits, flat_logits)[(turn + i) % 2 or interpreted(impl)](n, v, seed=1, dtype=storage)
        teacher = known(tail, n, v, k, recorded, RECORDED.get(option, 1.0))
        loss, grad = check(impl, logits, teacher, divergence=divergence, **make(n, v))
        assert loss.abs().max() > 1e-3, option
        assert grad.abs().max() > 1e-4, option


@BY_TAIL
@pytest.mark.parametrize("k", [1, 2, 37])
def test_any_number_of_ids(impl: str, tail: str, k: int) -> None:
    """One, and every id of the vocabulary: then there is no tail."""
    full = TopK.from_logits(flat_logits(3, 37, seed=2), k, tail=tail if tail != "samples" else "bucket")
    if tail == "samples":
        full = TopK.from_samples(full.indices, 1 + torch.arange(3 * k).view(3, k))
    for divergence in TAKES[tail]:
        if divergence == "tvd" and k == 37:
            continue  # bit-equal sums may tie
        check(impl, flat_logits(3, 37, seed=1), full, divergence=divergence, target=labels(3, 37))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd", "reverse_kl", "cross_entropy"])
def test_all_ids_known_is_the_whole_teacher(impl: str, divergence: str) -> None:
    student, logits = peaked_logits(3, 37, seed=1), flat_logits(3, 37, seed=2)
    want = evaluate(impl, student, logits, divergence=divergence, temperature=2.0)
    for tail in ("bucket", "renormalize", "support", "uniform"):
        if divergence in TAKES[tail]:
            teacher = TopK.from_logits(logits, 37, tail=tail, temperature=2.0)
            got = evaluate(impl, student, teacher, divergence=divergence, temperature=2.0)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_bucket_is_a_lower_bound(impl: str) -> None:
    student, logits = peaked_logits(4, 203, seed=1), flat_logits(4, 203, seed=2)
    whole = evaluate(impl, student, logits)[0]
    last = torch.zeros(4)
    for k in (1, 5, 40, 202):
        part = evaluate(impl, student, TopK.from_logits(logits, k))[0]
        assert bool((part >= last - 1e-6).all())
        assert bool((part <= whole + 1e-5).all())
        last = part
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-5)  # one other id is no coarser


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_other_ids_outside_the_support_get_no_gradient(impl: str, divergence: str) -> None:
    teacher = known("support", 3, 41, 8)
    _, grad = evaluate(impl, flat_logits(3, 41), teacher, divergence=divergence)
    named = torch.zeros(3, 42).scatter(1, teacher.indices.where(teacher.indices >= 0, 41), 1.0)[:, :41] > 0
    assert bool((grad[~named] == 0).all())
    assert bool((grad[named] != 0).all())


def test_conversion_of_the_temperature(impl: str) -> None:
    """log P is a logit: renormalised, it can be taken at any temperature. The other tails name both."""
    student, per_row = flat_logits(3, 41), torch.tensor([0.5, 1.0, 3.0])
    for tail in ("renormalize", "support"):
        recorded = known(tail, 3, 41, 8, temperature=2.0)
        for own in (0.7, 2.0, per_row):
            options = {"divergence": "forward_kl", "temperature": 1.5, "teacher_temperature": own}
            got = check(impl, student, recorded, **options)
            scale = 2.0 / own.unsqueeze(1) if isinstance(own, Tensor) else 2.0 / own
            ready = TopK(recorded.indices, recorded.log_probs * scale, tail=tail)
            want = evaluate(impl, student, ready, temperature=1.5, teacher_temperature=1.0)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_indices_of_any_kind(impl: str, integers: torch.dtype) -> None:
    for tail in ("bucket", "uniform"):
        full = TopK.from_logits(flat_logits(3, 41, seed=2), 8, tail=tail)
        want = evaluate(impl, flat_logits(3, 41), full)
        wide = full.indices.to(integers).repeat_interleave(2, 1)
        strided = TopK(wide[:, ::2], full.log_probs.t().contiguous().t(), tail=tail)
        assert not strided.indices.is_contiguous()
        got = evaluate(impl, flat_logits(3, 41), strided)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@BY_TAIL
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 41), -1), ((41,), 0), ((2, 41, 1, 3), 1), ((41, 6), 0)], ids=str)
def test_leading_dimensions_and_maps(impl: str, tail: str, shape: tuple[int, ...], dim: int) -> None:
    rows = torch.Size(shape).numel() // 41
    student, teacher = flat_logits(rows, 41), known(tail, rows, 41, 8)
    want_loss, want = evaluate(impl, student, teacher)
    of_rows = [n for i, n in enumerate(shape) if i != dim % len(shape)]
    given = student.view(*of_rows, 41).movedim(-1, dim)
    folded = TopK(teacher.indices.view(*of_rows, 8), teacher.log_probs.view(*of_rows, 8), tail=tail)
    loss, grad = evaluate(impl, given, folded, dim=dim)
    assert loss.shape == tuple(of_rows)
    assert grad.shape == given.shape
    torch.testing.assert_close(loss.flatten(), want_loss)
    torch.testing.assert_close(grad.movedim(dim, -1).reshape(rows, 41), want)


@BY_TAIL
def test_reductions(impl: str, tail: str) -> None:
    n, v = 5, 41
    student, teacher = flat_logits(n, v), known(tail, n, v, 8)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    target = torch.tensor([3, 4, -100, 5, 6])
    rows, _ = evaluate(impl, student, teacher, target=target, row_weight=weight)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    args = [x.to(device) for x in (student, target, weight)]
    there = TopK(teacher.indices.to(device), teacher.log_probs.to(device), tail=tail)
    for reduction, normalizer, divisor in (
        *(("sum", None, 1.0), ("mean", None, 2.5), ("batchmean", None, 5.0)),
        *(("mean", 7.0, 7.0), ("sum", torch.tensor(3), 3.0), ("mean", 0.0, INF)),
    ):
        leaf = args[0].detach().clone().requires_grad_()
        options = {"row_weight": args[2], "reduction": reduction, "normalizer": normalizer, "impl": impl}
        loss = fastkd.kd_loss(leaf, there, args[1], **options)  # type: ignore[call-overload]
        loss.backward()
        assert loss.item() == pytest.approx(float(rows.double().sum()) / divisor, rel=1e-6)
        each = fastkd.kd_loss(args[0].requires_grad_(), there, args[1], row_weight=args[2], reduction="none", impl=impl)
        (want,) = torch.autograd.grad(each.sum() / divisor, args[0])
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-9)


@BY_TAIL
def test_nothing_that_counts(impl: str, tail: str) -> None:
    """0, with zero gradients and parts, whether no row is there or every one is dropped."""
    for n, target in ((0, torch.zeros(0, dtype=torch.long)), (3, torch.full((3,), -100))):
        leaf = flat_logits(n, 41).requires_grad_()
        loss, parts = fastkd.kd_loss(leaf, known(tail, max(n, 1), 41, 8) if n else empty(tail), target,
                                     return_parts=True, impl=impl)  # fmt: skip
        loss.backward()
        assert loss.item() == 0
        assert leaf.grad is not None
        assert bool((leaf.grad == 0).all())
        assert [float(x) for x in parts] == [0.0] * 5


def empty(tail: str) -> TopK:
    return TopK(torch.zeros(0, 8, dtype=torch.long), torch.zeros(0, 8), tail=tail)


@BY_TAIL
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_parts(impl: str, tail: str, reduction: str) -> None:
    student, teacher, target = flat_logits(4, 41), known(tail, 4, 41, 8), labels(4, 41)
    best = teacher.indices.gather(1, teacher.log_probs.masked_fill(teacher.indices < 0, -INF).argmax(1, True))
    student[:3] = student[:3].scatter(1, best[:3], 9.0)
    target[1], target[2] = best[1], -100
    loss, parts = fastkd.kd_loss(student, teacher, target, alpha=0.3, reduction=reduction, return_parts=True, impl=impl)  # type: ignore[call-overload]
    torch.testing.assert_close(0.3 * parts.hard + 0.7 * parts.soft, loss)
    agreement, rows = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    right = torch.tensor([0.0, 1.0, 0.0, 0.0])
    if reduction == "mean":
        agreement, right, rows = agreement.sum() / 3, right.sum() / 3, torch.tensor(3)
    torch.testing.assert_close(parts.teacher_agreement, agreement)
    torch.testing.assert_close(parts.target_agreement, right)
    assert torch.equal(parts.rows, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "support"])
def test_overwrite_student(impl: str, tail: str, dtype: torch.dtype) -> None:
    """The gradient lies where the logits were, with the bits of a separate one."""
    leaf, teacher = flat_logits(3, 41, dtype=dtype).requires_grad_(), known(tail, 3, 41, 8)

    def backward(overwrite: bool) -> tuple[Tensor, Tensor]:
        student, seen = leaf * 1, []
        student.register_hook(seen.append)
        fastkd.kd_loss(student, teacher, labels(3, 41), overwrite_student=overwrite, impl=impl).backward()
        return student, seen[0]

    student, grad = backward(True)
    assert grad.data_ptr() == student.data_ptr()
    assert torch.equal(grad, backward(False)[1])


def test_a_large_vocabulary_of_another_size() -> None:
    """Qwen's heads are padded differently: 151936 rows, or 152064 where the teacher is larger."""
    small, large, rows = 151936, 152064, 2
    logits = flat_logits(rows, large, seed=2)
    teacher = TopK.from_logits(logits, 50)
    teacher.indices[0, 3] = large - 1
    student = flat_logits(rows, small)
    inside = teacher.indices < small
    kept = TopK(teacher.indices.where(inside, -1), teacher.log_probs, tail="renormalize")
    want = evaluate("native", student, kept)
    same = torch.arange(large).where(torch.arange(large) < small, -1)
    for options in ({"shared_vocab": small}, {"vocab_map": same}):
        got = evaluate("native", student, teacher, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match=rf"hold ids from 0 to {small - 1} .*got {large - 1}"):
        fastkd.kd_loss(student, teacher)
    with pytest.raises(
        ValueError, match=r"unless shared_vocab or vocab_map is given, got 152064 for a student of 1519"
    ):
        fastkd.kd_loss(student, logits)
    # The other way round, the student's further ids are not asked about.
    got = evaluate("native", logits, TopK(kept.indices, kept.log_probs), shared_vocab=small)
    want = evaluate("native", logits[:, :small], kept)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][:, :small], want[1])
    assert bool((got[1][:, small:] == 0).all())
