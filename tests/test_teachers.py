"""Teachers of every kind together, the student's own best ids, and vocabularies that are numbered differently."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sparse_problems import INF, divergence_of, evaluate, known, labels, soft, upstream, weighed
from torch import Tensor

import fastkd
from fastkd import Head, TopK
from fastkd.testing import assert_as_exact_as_fp32, flat_logits, peaked_logits

pytestmark = pytest.mark.few_interpreted(41)  # its kernels have tests of their own
N, V, K, H = 4, 61, 9, 6
NAN = float("nan")
SPARSE = [
    known("bucket", N, V, K),
    known("support", N, V, 5, torch.bfloat16, seed=3),
    known("uniform", N, V, 4, seed=4),
]
RENORMALIZED, SAMPLES = known("renormalize", N, V, K, seed=5), known("samples", N, V, K, seed=6)
DENSE = [peaked_logits(N, V, seed=7), flat_logits(N, V, seed=8, dtype=torch.bfloat16)]
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def stored(teacher: Any) -> Tensor:
    """What float32 code would round."""
    return teacher.log_probs if isinstance(teacher, TopK) else teacher


def mixture(teachers: list[Any], weight: Tensor, divergence: str, target: Tensor | None = None, **options: Any) -> Any:
    """Loss and gradient of a sum of divergences, over the student's logits and what the teachers store."""

    def compute(student: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        temperature = options.get("temperature", 1.0)
        total = torch.zeros(len(leaf)).to(leaf)
        for one, values, share in zip(teachers, given, weight.unbind(-1), strict=True):
            if isinstance(one, TopK):
                part = soft(divergence, leaf, one, values, **options, teacher_temperature=1.0)
            else:
                lq, lp = (leaf / temperature).log_softmax(-1), values.to(leaf).log_softmax(-1)
                part = temperature**2 * divergence_of(divergence, lp, lq, 0.5)
            total = total + torch.where(share == 0, 0.0, share.to(leaf) * part)
        loss = weighed(leaf, total, target, **options)
        (grad,) = torch.autograd.grad(loss, leaf, upstream(len(leaf)).to(loss))
        return loss.detach(), grad

    return compute


MIXED = {
    "forward_kl": [*SPARSE, RENORMALIZED, SAMPLES, DENSE[0]],
    "jsd": [DENSE[0], SPARSE[0], RENORMALIZED, DENSE[1], SPARSE[2]],
    "reverse_kl": [SPARSE[0], SPARSE[1]],
    "tvd": [SPARSE[2], DENSE[1]],
}


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("divergence", MIXED)
def test_every_kind_at_once(impl: str, divergence: str, dtype: torch.dtype) -> None:
    teachers = MIXED[divergence]
    student = flat_logits(N, V, seed=1, dtype=dtype)
    weight = torch.rand(N, len(teachers)).index_fill(0, torch.tensor([2]), 0.25)
    weight[0, 0] = weight[3, -1] = 0
    for options in (
        {},
        {"temperature": 2.0, "target": labels(N, V), "alpha": torch.linspace(0, 1, N), "label_smoothing": 0.1},
    ):
        got = evaluate(
            impl, student, teachers, teacher_weight=weight, divergence=divergence, teacher_temperature=1.0, **options
        )
        compute = mixture(teachers, weight, divergence, **options)  # type: ignore[arg-type]
        assert got[1].dtype is dtype
        assert_as_exact_as_fp32(got, compute, student, *(stored(x) for x in teachers), copies=3)
        assert float(got[1].abs().max()) > 1e-3


def test_order_does_not_matter(impl: str) -> None:
    teachers = MIXED["forward_kl"]
    weight = torch.linspace(0.1, 0.9, len(teachers))
    student = flat_logits(N, V, seed=1)
    want = evaluate(impl, student, teachers, teacher_weight=weight)
    for order in (range(5, -1, -1), (2, 0, 4, 5, 1, 3)):
        turned = [teachers[i] for i in order]
        got = evaluate(impl, student, turned, teacher_weight=weight[list(order)].tolist())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_row", [False, True])
def test_agreement_counts_by_weight(impl: str, by_row: bool) -> None:
    student = flat_logits(N, V, seed=1)
    best = student.argmax(1, keepdim=True)
    right = TopK(torch.cat([best, (best + 1) % V], 1), torch.tensor([[0.6, 0.3]] * N).log())
    wrong = TopK(torch.cat([best, (best + 1) % V], 1), torch.tensor([[0.3, 0.6]] * N).log())
    weight = torch.tensor([0.5, 0.25, 0.125]).expand(N, 3) if by_row else (0.5, 0.25, 0.125)
    options: dict[str, Any] = {"reduction": "none", "return_parts": True, "impl": impl}
    for teachers, want in (([wrong, right, student], 0.375), ([right, wrong, wrong], 0.5), ([wrong] * 3, 0.0)):
        _, parts = fastkd.kd_loss(student, teachers, teacher_weight=weight, **options)
        assert parts.teacher_agreement.tolist() == [want] * N
    _, parts = fastkd.kd_loss(student, right, teacher_weight=(0.25,), **options)
    assert parts.teacher_agreement.tolist() == [0.25] * N


def test_one_among_one(impl: str) -> None:
    student = flat_logits(N, V, seed=1)
    for teacher in (*SPARSE, RENORMALIZED, SAMPLES):
        want = evaluate(impl, student, teacher)
        for a, b in zip(evaluate(impl, student, [teacher]), want, strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(evaluate(impl, student, [teacher, teacher]), want)
        torch.testing.assert_close(evaluate(impl, student, (teacher, teacher), teacher_weight=(0.25, 0.75)), want)


def test_a_temperature_for_each(impl: str) -> None:
    student, warm = flat_logits(N, V, seed=1), TopK.from_logits(flat_logits(N, V, seed=9), K, temperature=3.0)
    options: dict[str, Any] = {"temperature": 2.0, "teacher_weight": (1.0, 1.0, 1.0)}
    got = evaluate(impl, student, [warm, DENSE[0], SPARSE[1]], teacher_temperature=[3.0, 0.5, 2.0], **options)
    parts = [
        evaluate(impl, student, one, temperature=2.0, teacher_temperature=own)
        for one, own in ((warm, 3.0), (DENSE[0], 0.5), (SPARSE[1], 2.0))
    ]
    for i in range(2):
        torch.testing.assert_close(got[i], parts[0][i] + parts[1][i] + parts[2][i], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"teacher_temperature must be 3\.0, at which the TopK .* was recorded"):
        evaluate(impl, student, [warm, DENSE[0]], teacher_temperature=[1.0, 3.0])


@pytest.mark.parametrize("content", [NAN, INF, -INF])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_teacher_of_weight_0_may_hold_anything(impl: str, by_row: bool, content: float) -> None:
    teachers = [SPARSE[0], DENSE[0], RENORMALIZED, SPARSE[2]]
    student = flat_logits(N, V, seed=1)
    for silent in range(4):
        weight = torch.full((N, 4), 0.5)
        rows = torch.tensor([1, 3]) if by_row else torch.arange(N)
        weight[rows, silent] = 0
        want = evaluate(impl, student, teachers, teacher_weight=weight)
        one = teachers[silent]
        spoilt: Any = stored(one).clone()
        spoilt[rows] = content
        if isinstance(one, TopK):
            spoilt = TopK(one.indices, spoilt, tail=one.tail)
        got = evaluate(impl, student, [*teachers[:silent], spoilt, *teachers[silent + 1 :]], teacher_weight=weight)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_spoilt_row_harms_no_other(impl: str) -> None:
    teachers = [SPARSE[0], DENSE[0], SPARSE[2]]
    student = flat_logits(N, V, seed=1)
    want = evaluate(impl, student, teachers, target=labels(N, V))
    student[2, 7] = NAN
    got = evaluate(impl, student, teachers, target=labels(N, V))
    assert got[0].isnan().tolist() == [False, False, True, False]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hard": {"target": labels(N, V).index_fill(0, torch.tensor([1]), -100), "alpha": 0.3, "temperature": 2.0},
    "softcap": {"target": labels(N, V)},
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["bucket", "support", "uniform", "renormalize", "samples", "mixed", "mapped", "best"])
def test_a_head_is_its_logits(impl: str, kind: str, option: str, reduction: str) -> None:
    """One row at a time, or all: with the gradients that its logits hand down."""
    x, w, b = (flat_logits(n, m, seed=30 + n) for n, m in ((N, H), (V, H), (1, V)))
    teacher: Any = {one.tail: one for one in (*SPARSE, RENORMALIZED, SAMPLES)}.get(kind)
    options: dict[str, Any] = {"reduction": reduction, "teacher_temperature": 1.0, "impl": impl, **OPTIONS[option]}
    if kind == "mixed":
        teacher = [SPARSE[0], Head(x, w, b[0], scale=0.3), SPARSE[2], DENSE[1]]
    elif kind == "mapped":
        teacher, options["vocab_map"] = [DENSE[0], SPARSE[0]], (torch.arange(V) * 7 + 3) % V
    elif kind == "best":
        teacher = [DENSE[0], Head(x, w, b[0], scale=0.3)]
        options |= {"divergence": "reverse_kl", "student_topk": 5}
    if torch.cuda.is_available() and impl == "triton":
        pytest.skip("on the CPU")
    wrap = {"scale": 0.7, "softcap": 3.0} if option == "softcap" else {}
    rows = torch.linspace(0.5, 1.5, N) if reduction == "none" else None

    def run(workspace: int | None) -> list[Tensor]:
        leaves = [y.clone().requires_grad_() for y in (x, w, b[0])]
        head = Head(*leaves, workspace=workspace, **wrap)
        loss = fastkd.kd_loss(head.logits() if workspace is None else head, teacher, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, rows)]

    want = run(None)
    for workspace in (1, 2**20):
        torch.testing.assert_close(run(workspace), want, rtol=2e-5, atol=2e-6)
    assert all(float(y.abs().max()) > 1e-3 for y in want)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("k", [1, 7, V])
def test_the_students_best_ids(impl: str, k: int, dtype: torch.dtype) -> None:
    """KL(q|p) of k + 1 events: the student's k best ids, and any other."""
    student = peaked_logits(N, V, seed=1, dtype=dtype) / 4
    ids = student.topk(k).indices
    others = torch.ones(N, V, dtype=torch.bool).scatter(1, ids, False)
    teachers, weight = DENSE, torch.linspace(0.2, 1, 2 * N).view(N, 2)
    options: dict[str, Any] = {"temperature": 2.0, "target": labels(N, V), "alpha": 0.25}

    def compute(student: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()

        def events(logits: Tensor, temperature: float) -> Tensor:
            log = (logits / temperature).log_softmax(-1)
            tail = torch.where(others, log, -INF).logsumexp(-1, keepdim=True)
            return torch.cat([log.gather(1, ids), tail][: 1 if k == V else 2], 1)

        lq = events(leaf, 2.0)
        parts = [w.to(leaf) * divergence_of("reverse_kl", events(t.to(leaf), own), lq, 0.0)
                 for t, own, w in zip(given, (1.0, 3.0), weight.unbind(1), strict=True)]  # fmt: skip
        loss = weighed(leaf, 4 * sum(parts), **options)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(loss, leaf, upstream(N).to(loss))
        return loss.detach(), grad

    got = evaluate(impl, student, teachers, divergence="reverse_kl", student_topk=k, teacher_weight=weight,
                   teacher_temperature=[1.0, 3.0], **options)  # fmt: skip
    assert_as_exact_as_fp32(got, compute, student, *teachers, copies=3)
    assert float(got[1].abs().max()) > 1e-3


def test_all_of_the_students_ids_are_reverse_kl(impl: str) -> None:
    student = flat_logits(N, V, seed=1)
    want = evaluate(impl, student, DENSE[0], divergence="reverse_kl")
    got = evaluate(impl, student, DENSE[0], divergence="reverse_kl", student_topk=V)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    shared = evaluate(impl, student, DENSE[0], divergence="reverse_kl", student_topk=40, shared_vocab=40)
    want = evaluate(impl, student[:, :40], DENSE[0][:, :40], divergence="reverse_kl")
    torch.testing.assert_close((shared[0], shared[1][:, :40]), want, rtol=1e-5, atol=1e-5)
    assert bool((shared[1][:, 40:] == 0).all())


def test_the_students_best_ids_where_a_side_is_masked(impl: str) -> None:
    student, teacher = flat_logits(N, V, seed=1), flat_logits(N, V, seed=2)
    student[0, 3:] = -INF  # fewer than k ids: the others weigh nothing
    teacher[1, student[1].argmax()] = -INF
    teacher[2, 5], student[3, 5] = NAN, NAN
    loss, grad = evaluate(impl, student, teacher, divergence="reverse_kl", student_topk=6)
    q, p = student[0, :3].log_softmax(-1), teacher[0].log_softmax(-1)[:3]
    assert float(loss[0]) == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-5)
    assert loss[1] == INF
    assert bool((grad[1] == 0).all())
    assert bool(loss[2:].isnan().all())
    assert bool(grad[0].isfinite().all())
    weight = torch.tensor([[1.0, 0.0]] * N)
    clean = flat_logits(N, V, seed=2)
    got = evaluate(impl, student[:3], [clean[:3], teacher[:3] * NAN], divergence="reverse_kl", student_topk=6,
                   teacher_weight=weight[:3])  # fmt: skip
    alone = evaluate(impl, student[:3], clean[:3], divergence="reverse_kl", student_topk=6)
    torch.testing.assert_close(got, alone)


def test_agreement_under_the_students_best_ids(impl: str) -> None:
    """With the teacher's best id of all, which may be none of the student's k."""
    student, teacher = flat_logits(N, V, seed=1), flat_logits(N, V, seed=2)
    teacher[1, student[1].argmax()] = 9.0
    teacher[2, student[2].argmin()] = 9.0
    _, parts = fastkd.kd_loss(student, [teacher, DENSE[0]], divergence="reverse_kl", student_topk=1, return_parts=True,
                              teacher_weight=(1.0, 0.0), reduction="none", impl=impl)  # fmt: skip
    assert parts.teacher_agreement.tolist() == (student.argmax(1) == teacher.argmax(1)).float().tolist()
    assert parts.teacher_agreement[1:3].tolist() == [1.0, 0.0]


def test_refusals_of_student_topk() -> None:
    student = flat_logits(N, V)
    for divergence in ("forward_kl", "jsd", "skew_reverse_kl"):
        with pytest.raises(ValueError, match=f"student_topk must be None but for reverse_kl, got {divergence}"):
            fastkd.kd_loss(student, student, divergence=divergence, student_topk=3)
    options: dict[str, Any] = {"divergence": "reverse_kl"}
    with pytest.raises(ValueError, match=r"student_topk must be at most 61, the shared vocabulary, got 62"):
        fastkd.kd_loss(student, student, student_topk=62, **options)
    with pytest.raises(ValueError, match=r"student_topk must be at most 9, the shared vocabulary, got 10"):
        fastkd.kd_loss(student, student, student_topk=10, shared_vocab=9, **options)
    mapping = torch.tensor([0, 1] + [-1] * (V - 2))
    with pytest.raises(ValueError, match=r"student_topk must be at most 2, the shared vocabulary, got 10"):
        fastkd.kd_loss(student, student, student_topk=10, vocab_map=mapping, **options)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"student_topk must be positive, got {k}"):
            fastkd.kd_loss(student, student, student_topk=k, **options)
    for wrong in (2.0, True, "3"):
        with pytest.raises(TypeError, match="student_topk must be an integer, got"):
            fastkd.kd_loss(student, student, student_topk=wrong, **options)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"student_topk must be None unless every teacher has logits, got 3"):
        fastkd.kd_loss(student, [student, SPARSE[0]], student_topk=3, **options)


def test_the_mathematics_of_this_file_is_right() -> None:
    """A number by hand: two ids known, two not."""
    student = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log())
    z = math.e + 3
    want = 0.5 * math.log(0.5 * z / math.e) + 0.25 * math.log(0.25 * z) + 0.25 * math.log(0.25 * z / 2)
    assert float(fastkd.kd_loss(student, teacher)) == pytest.approx(want, rel=1e-6)
