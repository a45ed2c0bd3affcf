"""What a teacher of k ids a row may hold that no number should come of, or a small one, or an infinite one."""

from __future__ import annotations

import math

import pytest
import torch
from sparse_problems import INF, TAKES, evaluate, known, labels, plain
from torch import Tensor

import fastkd
from fastkd import Head, TopK
from fastkd.testing import assert_as_exact_as_fp32, flat_logits, peaked_logits

NAN = float("nan")
pytestmark = pytest.mark.few_interpreted(41)  # its kernels have tests of their own
BY_TAIL = pytest.mark.parametrize("tail", TAKES)
FORWARD, REVERSE = ("forward_kl", "cross_entropy"), ("reverse_kl", "skew_reverse_kl")


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], rows: list[int] | None = None) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a if rows is None else a[rows], b if rows is None else b[rows])


@BY_TAIL
@pytest.mark.parametrize("why", ["ignored", "row_weight", "alpha", "teacher_weight"])
def test_what_does_not_count_may_hold_anything(impl: str, tail: str, why: str) -> None:
    """NaN and log-probabilities that are none; where the row itself is dropped, wrong ids and a NaN student too."""
    student, teacher = flat_logits(3, 41), known(tail, 3, 41, 8)
    target = labels(3, 41)
    options = {
        "ignored": {"target": target.index_fill(0, torch.tensor([1]), -100)},
        "row_weight": {"target": target, "row_weight": torch.tensor([1.0, 0.0, 1.0])},
        "alpha": {"target": target, "alpha": torch.tensor([0.5, 1.0, 0.0])},
        "teacher_weight": {"teacher_weight": torch.tensor([[0.5], [0.0], [1.0]])},
    }[why]
    want = evaluate(impl, student, teacher, **options)
    for content in (NAN, INF, 7.0, -INF):
        ids, log_probs = teacher.indices.clone(), teacher.log_probs.clone()
        log_probs[1] = content
        if why in ("ignored", "row_weight"):
            student[1], ids[1] = NAN, torch.tensor([41, -7, 3, 3, 2**40, -1, 0, 0])
        same(evaluate(impl, student, TopK(ids, log_probs, tail=tail), **options), want)
    assert bool((want[1][1] == 0).all()) == (why != "alpha")


@BY_TAIL
@pytest.mark.parametrize("compact", [None, True, False])
def test_dropped_rows_of_a_head(impl: str, tail: str, compact: bool | None) -> None:
    x, w = torch.randn(3, 5), torch.randn(41, 5)
    ids, log_probs = known(tail, 3, 41, 8).tensors()
    target = torch.tensor([3, -100, 5])
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"

    def run() -> list[Tensor]:
        leaves = [x.to(device).requires_grad_(), w.to(device).requires_grad_()]
        teacher = TopK(ids.to(device), log_probs.to(device), tail=tail)
        loss = fastkd.kd_loss(Head(*leaves, compact=compact, workspace=1), teacher, target.to(device), impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    want = run()
    x, ids, log_probs = x.clone(), ids.clone(), log_probs.clone()
    x[1], ids[1, :3], log_probs[1] = NAN, torch.tensor([99, 99, -5]), NAN
    same(tuple(run()), tuple(want))


@BY_TAIL
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_unusable_row_is_nan_and_harms_no_other(impl: str, tail: str, side: str, poison: float) -> None:
    if side == "teacher" and poison == INF and tail in ("bucket", "uniform"):
        pytest.skip("its probabilities add up to more than 1: refused")
    for divergence in TAKES[tail]:
        student, teacher = flat_logits(3, 41), known(tail, 3, 41, 8)
        ids, log_probs = teacher.indices, teacher.log_probs.clone()
        options = {"divergence": divergence, "target": labels(3, 41), "temperature": 1.0}
        want = evaluate(impl, student, teacher, **options)
        place = int(ids[1, 0])
        if side == "student":
            student[1, place] = poison
        else:
            log_probs[1, 0] = poison
        loss, grad = evaluate(impl, student, TopK(ids, log_probs, tail=tail), **options)
        assert bool(loss[1].isnan())
        same((loss, grad), want, [0, 2])


@BY_TAIL
def test_rows_without_entries(impl: str, tail: str) -> None:
    """Bucket: all others agree with all others. Uniform: with every id. The other tails have no distribution."""
    teacher = known(tail, 3, 41, 8)
    student, ids = flat_logits(3, 41), teacher.indices.clone()
    want = evaluate(impl, student, teacher)
    ids[1] = -1
    log_probs = teacher.log_probs.clone()
    log_probs[1, :3] = torch.tensor([NAN, 5.0, INF])  # nobody looks at those of absent entries
    got = evaluate(impl, student, TopK(ids, log_probs, tail=tail))
    same(got, want, [0, 2])
    if tail == "bucket":
        assert float(got[0][1]) == pytest.approx(0, abs=1e-6)
        assert float(got[1][1].abs().max()) < 1e-6
    elif tail == "uniform":
        for a, b in zip(got, evaluate(impl, student, torch.zeros(3, 41)), strict=True):
            torch.testing.assert_close(a[1], b[1])
    else:
        assert bool(got[0][1].isnan())


@BY_TAIL
@pytest.mark.parametrize("masked", ["some", "tail"])
def test_entries_of_minus_infinity(impl: str, tail: str, masked: str) -> None:
    """A teacher with a masked vocabulary, or one peaked so that the rest underflows: probability 0, not NaN."""
    student, teacher = flat_logits(3, 41), known(tail, 3, 41, 8)
    log_probs = teacher.log_probs.clone()
    log_probs[:, 1] = -INF
    if masked == "tail":
        log_probs[:, 2:] = -INF
        log_probs[:, 0] = 0.0
    for divergence in TAKES[tail]:
        spoilt = TopK(teacher.indices, log_probs, tail=tail)
        loss, grad = evaluate(impl, student, spoilt, divergence=divergence)
        assert bool(grad.isfinite().all())
        if divergence == "reverse_kl":
            assert bool((loss == INF).all())
            assert bool((grad == 0).all())
        elif divergence not in REVERSE:
            assert_as_exact_as_fp32((loss, grad), plain(spoilt, divergence=divergence), student, log_probs, copies=2)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "samples", "support", "uniform"])
@pytest.mark.parametrize("divergence", FORWARD)
def test_a_student_masked_under_the_teacher(impl: str, tail: str, divergence: str) -> None:
    """+inf, and the gradient that it always has."""
    student, teacher = flat_logits(3, 41), known(tail, 3, 41, 8)
    student[1, teacher.indices[1, 0]] = -INF
    got = evaluate(impl, student, teacher, divergence=divergence)
    assert got[0].isposinf().tolist() == [False, True, False]
    assert bool(got[1].isfinite().all())
    compute = plain(teacher, divergence=divergence)
    assert_as_exact_as_fp32(got, compute, student, teacher.log_probs, copies=2)
    assert float(got[1][1].abs().max()) > 1e-3


@pytest.mark.parametrize("divergence", TAKES["bucket"])
def test_a_vocabulary_masked_on_both_sides(impl: str, divergence: str) -> None:
    """All ids that are left are named: what rounding leaves of the probability belongs to nobody."""
    masked = torch.arange(41) >= 8
    student, teacher = (flat_logits(5, 41, seed=seed).masked_fill(masked, -INF) for seed in (1, 2))
    want = evaluate(impl, student[:, :8], teacher[:, :8], divergence=divergence)
    for k in (8, 12):
        loss, grad = evaluate(impl, student, TopK.from_logits(teacher, k), divergence=divergence)
        torch.testing.assert_close((loss, grad[:, :8]), want, rtol=1e-5, atol=1e-5)
        assert bool((grad[:, 8:] == 0).all())
    loss, _ = evaluate(impl, student, TopK.from_logits(flat_logits(5, 41), 8), divergence=divergence)
    assert bool((loss == INF).all()) == (divergence in FORWARD)


@pytest.mark.parametrize("divergence", TAKES["bucket"])
@pytest.mark.parametrize("beyond", [0.0, 2.0**-10])
def test_all_probability_is_known(impl: str, divergence: str, beyond: float) -> None:
    """Exactly 1, or slightly above by rounding: the rest is 0, and 2^-24 in the reverse divergences."""
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log().bfloat16().repeat(2, 1)
    log_probs[0, 0] = 0.0
    log_probs[0, 1:] = -INF if divergence not in REVERSE else -30.0
    log_probs = (log_probs.double().exp().log() + math.log1p(beyond)).float()
    teacher = TopK(torch.tensor([[3, 1, 2], [0, 1, 4]]), log_probs)
    student = flat_logits(2, 41)
    got = evaluate(impl, student, teacher, divergence=divergence)
    assert bool(got[0].isfinite().all())
    assert_as_exact_as_fp32(got, plain(teacher, divergence=divergence), student, log_probs, copies=4)
    if divergence == "reverse_kl":
        q = student[0].double().softmax(0)
        rest = 1 - q[[3, 1, 2]].sum()
        named = (q[[3, 1, 2]] * (q[[3, 1, 2]].log() - log_probs[0].double())).sum()
        want = named + rest * (rest.log() + 24 * math.log(2)) + math.log1p(beyond)
        assert float(got[0][0]) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("divergence", TAKES["bucket"])
@pytest.mark.parametrize("gap", [28.0, 80.0])
def test_a_student_that_leaves_the_tail_next_to_nothing(impl: str, divergence: str, gap: float) -> None:
    """1e-12, or what underflows as a float32 beside 1: the sum of the others, not 1 minus the sum of the named."""
    teacher = known("bucket", 3, 41, 8)
    student = flat_logits(3, 41)
    named = torch.zeros(3, 42).scatter(1, teacher.indices.where(teacher.indices >= 0, 41), 1.0)[:, :41] > 0
    student = torch.where(named, student, student - gap)
    got = evaluate(impl, student, teacher, divergence=divergence)
    assert_as_exact_as_fp32(got, plain(teacher, divergence=divergence), student, teacher.log_probs, copies=4)
    if divergence == "forward_kl":
        rest = 1 - torch.where(teacher.indices >= 0, teacher.log_probs.double().exp(), 0.0).sum(1)
        torch.testing.assert_close(torch.where(named, 0.0, got[1].double()).sum(1), -rest * torch.linspace(0.5, 1.5, 3),
                                   rtol=1e-5, atol=0, check_dtype=False)  # fmt: skip


@pytest.mark.parametrize("tail", ["bucket", "support", "uniform", "renormalize"])
def test_gaps_of_1e4(impl: str, tail: str) -> None:
    teacher = known(tail, 3, 41, 8)
    for place in (int(teacher.indices[0, 0]), next(i for i in range(41) if i not in teacher.indices[0])):
        for sign in (1, -1) if impl != "triton" else (1,):
            student = flat_logits(3, 41)
            student[:, place] += sign * 1e4
            for divergence in TAKES[tail]:
                got = evaluate(impl, student, teacher, divergence=divergence)
                assert bool(got[0].isfinite().all())
                assert bool(got[1].isfinite().all())
                compute = plain(teacher, divergence=divergence)
                near = 2.0**-22 if divergence == "skew_kl" else 0.0
                assert_as_exact_as_fp32(got, compute, student, teacher.log_probs, copies=1, slack=(near, near))


@pytest.mark.parametrize("divergence", TAKES["support"])
def test_a_student_equal_to_the_teacher(impl: str, divergence: str) -> None:
    student = peaked_logits(3, 41, seed=5)
    for tail in ("bucket", "support"):
        teacher = TopK.from_logits(student, 8, tail=tail)
        loss, grad = evaluate(impl, student, teacher, divergence=divergence)
        assert bool(grad.isfinite().all())
        if divergence != "tvd":  # which has a kink there
            assert float(grad.abs().max()) < 1e-5
        if divergence != "cross_entropy":
            assert float(loss.abs().max()) < 1e-5


def test_one_id_alone(impl: str) -> None:
    for tail in ("bucket", "renormalize", "support", "uniform"):
        teacher = TopK(torch.tensor([[0]]), torch.tensor([[0.0]]), tail=tail)
        for divergence in TAKES[tail]:
            loss, grad = evaluate(impl, torch.tensor([[2.0]]), teacher, divergence=divergence)
            assert float(loss) == pytest.approx(0, abs=1e-6)
            assert float(grad) == pytest.approx(0, abs=1e-6)
