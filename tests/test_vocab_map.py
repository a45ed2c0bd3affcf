"""Vocabularies in another order, or that overlap in part: the soft term over the pairs of ids that mean the same."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from sparse_problems import INF, divergence_of, evaluate, known, labels, upstream, weighed
from torch import Tensor

import fastkd
from fastkd import Head, TopK
from fastkd.testing import assert_as_exact_as_fp32, flat_logits

pytestmark = pytest.mark.few_interpreted(41)  # its kernels have tests of their own
N, S, T = 4, 53, 67  # rows, and how many ids the student and the teacher have
NAN = float("nan")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "cross_entropy", "mse")


def partial() -> Tensor:
    """Of the teacher's 67 ids, 40 mean one of the student's, in no order."""
    generator = torch.Generator().manual_seed(1)
    mapping = torch.full((T,), -1)
    taught = torch.randperm(T, generator=generator)[:40]
    mapping[taught] = torch.randperm(S, generator=generator)[:40]
    return mapping


def test_a_permutation_is_the_teacher_in_the_students_order(impl: str) -> None:
    student, teacher, order = flat_logits(N, S, seed=1), flat_logits(N, S, seed=2), torch.randperm(S)
    options: dict[str, Any] = {"target": labels(N, S), "alpha": 0.3, "temperature": 2.0}
    for divergence in DIVERGENCES:
        want = evaluate(impl, student, teacher, divergence=divergence, **options)
        got = evaluate(impl, student, teacher[:, order], divergence=divergence, vocab_map=order, **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
def test_exact(impl: str, divergence: str, dtype: torch.dtype) -> None:
    """The soft term over 40 pairs, the hard one over all of the student's ids, also those that mean none."""
    mapping = partial()
    student, teacher = flat_logits(N, S, seed=1, dtype=dtype), flat_logits(N, T, seed=2, dtype=dtype)
    taught = (mapping >= 0).nonzero().squeeze(1)
    unmapped = next(i for i in range(S) if i not in mapping)
    options: dict[str, Any] = {
        "target": torch.tensor([unmapped, 0, -100, 5]),
        "alpha": torch.tensor([0.5, 0.0, 0.5, 0.25]),
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "row_weight": torch.linspace(2, 0.5, N),
    }
    beta = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}.get(divergence, 0.0)

    def compute(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        lp = (teacher[:, taught] / 2).log_softmax(-1)
        lq = (leaf[:, mapping[taught]] / 2).log_softmax(-1)
        loss = weighed(leaf, 4 * divergence_of(divergence, lp, lq, beta), **options)
        (grad,) = torch.autograd.grad(loss, leaf, upstream(N).to(loss))
        return loss.detach(), grad

    got = evaluate(impl, student, teacher, divergence=divergence, vocab_map=mapping, **options)
    assert got[1].dtype is dtype
    assert_as_exact_as_fp32(got, compute, student, teacher, copies=4)
    assert float(got[1].abs().max()) > 1e-3


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "support", "uniform", "samples"])
def test_a_topk_drops_other_ids_and_is_renormalised(impl: str, tail: str) -> None:
    mapping, student, teacher = partial(), flat_logits(N, S, seed=1), known(tail, N, T, 12)
    if tail == "support":
        mapping[teacher.indices[2].clamp(min=0)] = -1
        mapping[teacher.indices[2, 0]] = next(i for i in range(S) if i not in mapping)
    pairs = mapping[mapping >= 0]
    place = torch.full((S,), -1).index_copy(0, pairs, torch.arange(len(pairs)))
    ids = torch.where(teacher.indices >= 0, mapping[teacher.indices.clamp(min=0)], -1)
    inner = torch.where(ids >= 0, place[ids.clamp(min=0)], -1)
    expected = TopK(inner, teacher.log_probs, tail="support" if tail == "support" else "renormalize")
    got = evaluate(impl, student, teacher, vocab_map=mapping)
    want_loss, want = evaluate(impl, student[:, pairs], expected)
    torch.testing.assert_close(got[0], want_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], torch.zeros(N, S).index_copy(1, pairs, want), rtol=1e-5, atol=1e-7)
    # The same by shared_vocab, where the pairs are the first ids.
    first = torch.arange(T).where(torch.arange(T) < 30, -1)
    torch.testing.assert_close(
        evaluate(impl, student, teacher, vocab_map=first, target=labels(N, S)),
        evaluate(impl, student, teacher, shared_vocab=30, target=labels(N, S)),
        rtol=1e-5,
        atol=1e-7,
    )


def test_what_a_topk_keeps_is_all_in_reverse_too(impl: str) -> None:
    """Renormalised, and beside it 2^-24 for all other ids together."""
    student, logits = flat_logits(N, S, seed=1), flat_logits(N, T, seed=2)
    teacher = TopK.from_logits(logits, 12)
    got, _ = evaluate(impl, student, teacher, shared_vocab=30, divergence="reverse_kl")
    for row in range(N):
        kept = teacher.indices[row] < 30
        ids, known_of = teacher.indices[row][kept], teacher.log_probs[row][kept].double()
        lq = student[row, :30].double().log_softmax(0)
        rest = 1 - lq[ids].exp().sum()
        lp = known_of.log_softmax(0)
        want = (lq[ids].exp() * (lq[ids] - lp)).sum() + rest * (rest.log() + 24 * math.log(2))
        assert float(got[row]) == pytest.approx(float(want), rel=2e-6)


def test_several_teachers_and_a_head(impl: str) -> None:
    mapping, student = partial(), flat_logits(N, S, seed=1)
    x, w = flat_logits(N, 5, seed=3), flat_logits(T, 5, seed=4)
    teachers: list[Any] = [flat_logits(N, T, seed=2), known("bucket", N, T, 12), Head(x, w, workspace=1)]
    weight = torch.rand(N, 3)
    got = evaluate(impl, student, teachers, vocab_map=mapping, teacher_weight=weight)
    alone = [evaluate(impl, student, one, vocab_map=mapping) for one in teachers]
    for i in range(2):
        want = sum(weight[:, k].view(-1, *[1] * i) * alone[k][i] for k in range(3))
        torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-6)
    best = evaluate(impl, student, teachers[0], vocab_map=mapping, divergence="reverse_kl", student_topk=40)
    whole = evaluate(impl, student, teachers[0], vocab_map=mapping, divergence="reverse_kl")
    torch.testing.assert_close(best, whole, rtol=1e-5, atol=1e-6)


def test_what_is_not_mapped_may_hold_anything(impl: str) -> None:
    """On both sides, as long as there is no hard term; a row that is dropped too."""
    mapping, student, teacher = partial(), flat_logits(N, S, seed=1), flat_logits(N, T, seed=2)
    want = evaluate(impl, student, teacher, vocab_map=mapping)
    for content in (NAN, INF, -INF):
        teacher[:, mapping < 0] = content
        student[:, [i for i in range(S) if i not in mapping]] = content
        got = evaluate(impl, student, teacher, vocab_map=mapping)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    student[1] = NAN
    loss, grad = evaluate(impl, student, teacher, vocab_map=mapping, row_weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert loss[1] == 0
    assert bool((grad[1] == 0).all())
    loss, grad = evaluate(impl, student, teacher, vocab_map=mapping)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert torch.equal(grad[[0, 2, 3]], want[1][[0, 2, 3]])


@pytest.mark.parametrize("dim", [1, -1])
def test_maps_and_leading_dimensions(impl: str, dim: int) -> None:
    mapping, student, teacher = partial(), flat_logits(N, S, seed=1), flat_logits(N, T, seed=2)
    want_loss, want = evaluate(impl, student, teacher, vocab_map=mapping)
    folded = (x.view(2, 2, -1).movedim(-1, dim) for x in (student, teacher))
    loss, grad = evaluate(impl, *folded, vocab_map=mapping, dim=dim)  # type: ignore[misc, arg-type]
    assert torch.equal(loss.flatten(), want_loss)
    assert torch.equal(grad.movedim(dim, -1).reshape(N, S), want)


def test_parts(impl: str) -> None:
    """An id that is not mapped agrees with nobody."""
    mapping, student, teacher = partial(), flat_logits(N, S, seed=1), flat_logits(N, T, seed=2)
    one, two = mapping[mapping >= 0][:2].tolist()
    student[0, one], teacher[0, mapping.tolist().index(one)] = 9.0, 9.0
    student[1, next(i for i in range(S) if i not in mapping)] = 99.0
    teacher[1], student[1, two] = -1.0, 9.0
    teacher[1, mapping.tolist().index(two)] = 9.0
    options: dict[str, Any] = {"alpha": 0.25, "reduction": "none", "return_parts": True, "impl": impl}
    for given in (teacher, TopK.from_logits(teacher, 9), [teacher, teacher]):
        loss, parts = fastkd.kd_loss(student, given, torch.tensor([one, one, 0, 0]), vocab_map=mapping, **options)
        assert parts.teacher_agreement[:2].tolist() == [1.0, 0.0]
        assert parts.target_agreement[:2].tolist() == [1.0, 0.0]
        torch.testing.assert_close(0.25 * parts.hard + 0.75 * parts.soft, loss)


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "list": (TypeError, "vocab_map must be a tensor of ids, got list", {"vocab_map": [0, 1]}),
    "float": (TypeError, "vocab_map must hold integer ids, got torch.float32", {"vocab_map": torch.zeros(T)}),
    "shape": (
        ValueError,
        "vocab_map must have shape (teacher's vocabulary,), got (1, 67)",
        {"vocab_map": torch.zeros(1, T).long()},
    ),
    "device": (
        ValueError,
        "vocab_map must be on the student's device, cpu, got meta",
        {"vocab_map": partial().to("meta")},
    ),
    "above": (
        ValueError,
        "vocab_map must hold ids from 0 to 52, or -1, got 53",
        {"vocab_map": partial().index_fill(0, torch.tensor([4]), 53)},
    ),
    "below": (
        ValueError,
        "vocab_map must hold ids from 0 to 52, or -1, got -2",
        {"vocab_map": partial().index_fill(0, torch.tensor([4]), -2)},
    ),
    "twice": (
        ValueError,
        "vocab_map must hold no id twice, got 7",
        {"vocab_map": torch.full((T,), -1).index_fill(0, torch.tensor([3, 60]), 7)},
    ),
    "nothing": (
        ValueError,
        "vocab_map must map at least one id, got -1 everywhere",
        {"vocab_map": torch.full((T,), -1)},
    ),
    "length": (
        ValueError,
        "teacher must have the vocabulary that vocab_map is of, 66, got 67",
        {"vocab_map": partial()[:-1]},
    ),
    "shared_vocab": (
        ValueError,
        "shared_vocab must be None with vocab_map, got 9",
        {"vocab_map": partial(), "shared_vocab": 9},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, message, options = REFUSED[case]
    with pytest.raises(error, match="^kd_loss: " + re.escape(message) + "$"):
        fastkd.kd_loss(flat_logits(N, S), flat_logits(N, T), **options)
    with pytest.raises(error, match="^kd_loss: " + re.escape(message) + "$"):
        fastkd.kd_loss(Head(torch.zeros(N, 3), torch.zeros(S, 3)), flat_logits(N, T), **options)


def test_wrong_ids_of_a_topk_under_it() -> None:
    for wrong in (T, -2):
        teacher = TopK(torch.tensor([[3, wrong]] * N), torch.full((N, 2), -2.0))
        with pytest.raises(ValueError, match=rf"^kd_loss: teacher must hold ids from 0 to .*, got {wrong}$"):
            fastkd.kd_loss(flat_logits(N, S), teacher, vocab_map=partial())


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_of_the_map_is_noticed(inference: bool) -> None:
    with torch.inference_mode(inference):
        mapping = partial()
    student, teacher = flat_logits(N, S), flat_logits(N, T)
    before = fastkd.kd_loss(student, teacher, vocab_map=mapping)
    assert fastkd.kd_loss(student, teacher, vocab_map=mapping.clone()) == before
    with torch.inference_mode(inference):
        mapping[mapping.argmax()] = -1
    after = fastkd.kd_loss(student, teacher, vocab_map=mapping)
    assert after != before
    assert after == fastkd.kd_loss(student, teacher, vocab_map=mapping.clone())
    wider = flat_logits(N, S + 1)
    for _ in range(2):  # one map for students of two sizes
        assert fastkd.kd_loss(wider, teacher, vocab_map=mapping) != fastkd.kd_loss(student, teacher, vocab_map=mapping)


def test_a_map_is_checked_for_every_size_of_student() -> None:
    mapping = partial().index_fill(0, (partial() < 0).nonzero()[0], S)
    assert fastkd.kd_loss(flat_logits(N, S + 1), flat_logits(N, T), vocab_map=mapping).isfinite()
    with pytest.raises(ValueError, match=rf"vocab_map must hold ids from 0 to {S - 1}, or -1, got {S}"):
        fastkd.kd_loss(flat_logits(N, S), flat_logits(N, T), vocab_map=mapping)


def test_a_map_that_changes_before_backward(impl: str) -> None:
    mapping = partial()
    leaf = flat_logits(N, S).requires_grad_()
    loss = fastkd.kd_loss(leaf, flat_logits(N, T), vocab_map=mapping, reduction="none", impl=impl)
    mapping[0] = -1
    with pytest.raises(RuntimeError, match="modified in place before backward"):
        loss.sum().backward()
