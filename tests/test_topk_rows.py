"""What a teacher of k ids a row needs of the student's V logits: every implementation against plain float64 code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from logit_problems import STORAGE
from topk_problems import LOGITS, OPTIONS, SCALE, make, names, problem, slopes_for, solve, upstream
from torch import Tensor
from torch.nn import functional as F

from fastkd import _rows
from fastkd._rows import LogitRows
from fastkd.testing import assert_as_exact_as_fp32, exact_and_error, flat_logits

INF = float("inf")


def column(value: float | Tensor) -> Any:
    return value.double().unsqueeze(-1) if isinstance(value, Tensor) else value


def plain_events(rows: LogitRows, student: Tensor, ids: Tensor) -> Tensor:
    """log q of every id, 0 for one that is absent, and of all others together."""
    lq = (student[:, : rows.shared] / column(rows.temperature)).log_softmax(-1)
    others = torch.ones_like(lq, dtype=torch.bool)
    for i, row in enumerate(ids.tolist()):
        others[i, [j for j in row if j >= 0]] = False
    tail = torch.where(others, lq, -INF).logsumexp(-1, keepdim=True)
    tail = torch.where(others.any(-1, keepdim=True), tail, 0.0)
    return torch.cat([torch.where(ids >= 0, lq.gather(1, ids.clamp(0)), 0.0), tail], -1)


def plain_loss(rows: LogitRows, student: Tensor, ids: Tensor, c: Tensor) -> Tensor:
    """weight (alpha H + sum_e c_e log q_e), the second where 1 - alpha is not 0; by row."""
    weight = torch.ones(len(student)).double() if rows.row_weight is None else rows.row_weight.double()
    alpha = torch.as_tensor(rows.alpha, dtype=torch.float64)
    soft = torch.where(alpha == 1, 0.0, (c * plain_events(rows, student, ids)).sum(-1))
    if rows.target is None:
        return torch.where(weight == 0, 0.0, soft)
    kept = rows.target != rows.ignore_index
    hard = (
        F.cross_entropy(student, rows.target.where(kept, 0), label_smoothing=rows.label_smoothing, reduction="none")
        + rows.z_loss * student.logsumexp(-1).square()
    )
    scale = upstream(rows) * (SCALE if rows.reduce else 1.0)
    loss = torch.where(weight == 0, 0.0, scale * weight * alpha * hard + soft)
    return torch.where(kept, loss, 0.0)


@pytest.mark.parametrize("k", [0, 1, 40, 300])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_is_what_autograd_makes_of_plain_code(option: str, k: int) -> None:
    rows = make(option, dtype=torch.float64)
    ids = names(rows, min(k, rows.shared))
    present = torch.cat([ids >= 0, torch.ones(len(ids), 1, dtype=torch.bool)], -1)
    c = torch.where(present, slopes_for(ids).double(), 0.0)
    leaf = rows.student.clone().requires_grad_()
    plain_loss(rows, leaf, ids, c).sum().backward()

    want = plain_events(rows, rows.student, ids).masked_fill(~present, -INF)
    empty = ((ids >= 0).sum(-1) == rows.shared).unsqueeze(-1)
    want[:, -1:] = want[:, -1:].masked_fill(empty, -INF)
    # d/ds_j sum_e c_e log q_e = (c_e - q_e sum c) / T at an id, and in the tail q_j / Q (c_tail - Q sum c) / T.
    c[:, -1:] = torch.where(empty, 0.0, c[:, -1:])
    slopes = (c - want.exp() * c.sum(-1, keepdim=True)) / column(rows.temperature)
    state, events, grad = solve("reference", rows, ids, slopes)
    weight, alpha = state[:, _rows.WEIGHT], torch.as_tensor(rows.alpha, dtype=torch.float64)
    soft = ((weight != 0) & (alpha != 1)).unsqueeze(-1)
    torch.testing.assert_close(events, torch.where(soft, want, 0.0), rtol=1e-12, atol=1e-12)
    assert leaf.grad is not None
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-12)
    assert grad.abs().max() > (1e-3 if k else -1)  # the probability of everything has no slope


def check(impl: str, rows: LogitRows, ids: Tensor) -> None:
    """Events and gradient within the bar, the state the reference's."""
    slopes = slopes_for(ids)

    def compute(student: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return solve("reference", replace(rows, student=student), ids, slopes)[1:]

    state, events, grad = solve(impl, rows, ids, slopes)
    assert_as_exact_as_fp32((events, grad), compute, rows.student, slopes)
    want = solve("reference", replace(rows, student=rows.student.double()), ids, slopes)[0]
    torch.testing.assert_close(state, want, rtol=1e-5, atol=1e-5)


def interpreted(impl: str) -> bool:
    return impl == "triton" and not torch.cuda.is_available()


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_exact(impl: str, option: str, dtype: torch.dtype, logits: str) -> None:
    if interpreted(impl):
        turn = list(OPTIONS).index(option)
        if (dtype, logits) != (STORAGE[turn % 3], list(LOGITS)[turn // 3 % 3]):
            pytest.skip("interpreted: storage and logits take turns")
        rows = make(option, 3, 97, logits, dtype)
        check(impl, rows, names(rows, 20))
        return
    rows = make(option, logits=logits, dtype=dtype)
    check(impl, rows, names(rows, 40))


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("k", [0, 1, 3, 16, 90])
def test_any_number_of_ids(impl: str, k: int, dtype: torch.dtype) -> None:
    for option in ("soft", "hard_2", "soft_shared") if interpreted(impl) else OPTIONS:
        rows = make(option, 3, 90, dtype=dtype)
        check(impl, rows, names(rows, min(k, rows.shared)))


@pytest.mark.few_interpreted(5)
@pytest.mark.parametrize("option", ["soft", "hard", "hard_2", "shared", "overwrite"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("logits", ["peaked", "rising"])
def test_ids_around_the_edges_of_tiles(impl: str, option: str, dtype: torch.dtype, logits: str) -> None:
    """All in one tile, and one before and after each place where a tile or a vector may end."""
    v = 200 if interpreted(impl) else 4113
    rows = make(option, 2, v, logits, dtype)
    step = 16 if interpreted(impl) else 512
    edges = torch.arange(0, rows.shared, step)
    edges = torch.cat([edges, edges[1:] - 1, torch.tensor([rows.shared - 1])]).unique()
    near = torch.arange(step + 3, step + 3 + len(edges))
    check(impl, rows, torch.stack([edges.flip(0), near]))


@pytest.mark.parametrize(("n", "v"), [(1, 300), (65, 17), (3, 1), (3, 2), (2, 2047), (2, 2048), (2, 2049), (0, 9)])
def test_shapes(impl: str, n: int, v: int) -> None:
    if interpreted(impl) and n * v > 500:
        pytest.skip("interpreted: small vocabularies")
    for option in ("soft", "hard", "smoothing", "overwrite"):
        rows = make(option, n, v, dtype=torch.bfloat16)
        for k in {0, 1, min(v, 12)}:
            check(impl, rows, names(rows, k))


@pytest.mark.parametrize("k", [600, 5000])
def test_many_ids(impl: str, k: int) -> None:
    """More than a tile of them."""
    if interpreted(impl):
        k //= 4
    rows = make("hard_2", 2, 5000 if not interpreted(impl) else 1250)
    check(impl, rows, names(rows, k))


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("mass", [1e-3, 1e-12, 1e-30, 1e-80])
def test_a_tail_of_next_to_nothing_keeps_its_digits(impl: str, mass: float, temperature: float) -> None:
    """As a logarithm, and as the shares that its ids have in it."""
    rows = problem(flat_logits(3, 97), target=None, alpha=0.0, temperature=temperature)
    ids = names(rows, 20)
    others = torch.ones(3, 98, dtype=torch.bool).scatter(1, ids.where(ids >= 0, 97), False)[:, :97]
    rows.student[others] += temperature * math.log(mass)
    slopes = slopes_for(ids)
    _, events, grad = solve(impl, rows, ids, slopes)
    want = plain_events(rows, rows.student.double(), ids)[:, -1]
    assert want.max() < math.log(100 * mass)
    torch.testing.assert_close(events[:, -1].double(), want, rtol=3e-7, atol=0)
    lq = (rows.student.double() / temperature).log_softmax(-1)
    share = torch.where(others, (lq - want.unsqueeze(-1)).exp(), 0.0) * slopes[:, -1:]
    torch.testing.assert_close(torch.where(others, grad.double(), 0.0), share, rtol=5e-5, atol=1e-30)
    torch.testing.assert_close(share.sum(-1), slopes[:, -1].double(), rtol=1e-9, atol=0)


def test_no_tail(impl: str) -> None:
    """Every id is named, or all the others are at -inf: its slope falls on nobody, whatever it is."""
    rows = make("hard", 2, 60)
    ids = torch.rand(2, 60).argsort(-1)
    ids[1, 30:] = -1
    rows.student[1] = rows.student[1].masked_fill(torch.ones(60, dtype=torch.bool).scatter(0, ids[1, :30], False), -INF)
    rows.target[1] = ids[1, 7]
    slopes = slopes_for(ids)
    _, events, grad = solve(impl, rows, ids, slopes)
    assert (events[:, -1] == -INF).all()
    assert (events[1, 30:] == -INF).all()
    assert events[0].isfinite().sum() == 60
    _, _, other = solve(impl, rows, ids, slopes.index_fill(1, torch.tensor([60]), 1e6))
    assert torch.equal(grad, other)
    assert grad.isfinite().all()
    assert (grad[1][rows.student[1] == -INF] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_minus_infinity(impl: str, temperature: float) -> None:
    """Among the named, and in the tail."""
    rows = make("hard", 3, 97)
    rows.temperature = temperature
    ids = names(rows, 20)
    rows.student[1, ids[1, 3]] = -INF
    rows.student[2, 50:] = -INF
    rows.target[2] = 3
    _, events, _ = solve(impl, rows, ids, slopes_for(ids))
    assert events[1, 3] == -INF
    assert events[1, :3].isfinite().all()
    check(impl, rows, ids)


def test_logits_at_the_end_of_the_range(impl: str) -> None:
    """A mask made with the lowest finite number has a probability, of 0, and no infinite logarithm."""
    for dtype in STORAGE:
        for temperature in (1.0, 0.7):
            rows = problem(LOGITS["peaked"](2, 97).to(dtype), target=None, alpha=0.0, temperature=temperature)
            ids = names(rows, 10)
            rows.student[0, ids[0, 2]] = torch.finfo(dtype).min
            others = torch.ones(98, dtype=torch.bool).index_fill(0, ids[1].where(ids[1] >= 0, 97), False)[:97]
            rows.student[1, others] = torch.finfo(dtype).min
            _, events, grad = solve(impl, rows, ids, slopes_for(ids))
            assert events[0, 2].isfinite()
            assert events[0, 2] < -1e4
            assert events[1, -1].isfinite()
            assert grad.isfinite().all()


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_stride_and_alignment(impl: str, dtype: torch.dtype, offset: int) -> None:
    """And nothing around them is written."""
    n, v = 3, 97
    for stride in (v + 8, v + 15):
        for overwrite in (False, True):
            memory = torch.full((n * stride + 16,), 7.0, dtype=dtype)
            student = memory.as_strided((n, v), (stride, 1), offset)
            student.copy_(LOGITS["peaked"](n, v, dtype=dtype))
            rows = problem(student, label_smoothing=0.1, overwrite=False)
            ids = names(rows, 20)
            slopes = slopes_for(ids)
            want = solve("reference", rows, ids, slopes)
            _, events, grad = _in_place(impl, replace(rows, overwrite=overwrite), ids, slopes)
            torch.testing.assert_close(events, want[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad, want[2], rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
            around = torch.ones_like(memory, dtype=torch.bool)
            around.as_strided((n, v), (stride, 1), offset)[:] = False
            assert (memory[around] == 7).all()


def _in_place(impl: str, rows: LogitRows, ids: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``solve``, but over the very memory of the rows (on a GPU, of a copy that lies as they do)."""
    from fastkd import _dispatch

    module = _dispatch.pick("kd_loss(TopK)", impl, rows.student, ())
    if torch.cuda.is_available() and impl == "triton":
        return solve(impl, rows, ids, slopes)
    state, events = module.gather(rows, ids, None)
    grad = module.scatter(rows, ids, state, events, slopes, SCALE, upstream(rows))
    return state, events, grad.clone()


def test_one_gathers_for_another_to_scatter(impl: str) -> None:
    for option in ("hard_2", "shared", "by_row"):
        rows = make(option, 3, 97)
        ids = names(rows, 20)
        slopes = slopes_for(ids)
        want = solve("reference", rows, ids, slopes)[2]
        if impl != "triton" or not torch.cuda.is_available():
            for first, then in (("reference", impl), (impl, "reference")):
                torch.testing.assert_close(solve(first, rows, ids, slopes, then=then)[2], want, rtol=1e-4, atol=1e-6)


def test_agreement(impl: str) -> None:
    rows = replace(make("hard", 4, 97), agreement=True, row_weight=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    ids = names(rows, 20)
    favourite = rows.student.argmax(-1)
    rows.target[:] = torch.where(torch.arange(4) == 1, (favourite + 1) % 97, favourite)
    best = torch.where(torch.arange(4) == 2, (favourite + 1) % 97, favourite)
    ids[0, 0], ids[1, 1:] = favourite[0], torch.where(ids[1, 1:] == favourite[1], -1, ids[1, 1:])
    ids[0, 1:] = torch.where(ids[0, 1:] == favourite[0], -1, ids[0, 1:])
    state = solve(impl, rows, ids, slopes_for(ids), best)[0]
    assert state[:, _rows.TARGET_AGREES].tolist() == [1, 0, 1, 0]
    assert state[:, _rows.TEACHER_AGREES].tolist() == [1, 1, 0, 0]
    state = solve(impl, rows, ids, slopes_for(ids))[0]
    assert not state[:, _rows.TEACHER_AGREES].any()


def test_ties_go_to_the_first_id(impl: str) -> None:
    """One of the two named and the other not, in either order."""
    student = torch.zeros(2, 97)
    student[:, 31] = student[:, 64] = 5.0
    rows = problem(student, agreement=True, target=torch.tensor([31, 31]))
    state = solve(impl, rows, torch.tensor([[31, 2], [64, 2]]), torch.zeros(2, 3), torch.tensor([31, 64]))[0]
    assert state[:, _rows.TARGET_AGREES].tolist() == [1, 1]
    assert state[:, _rows.TEACHER_AGREES].tolist() == [1, 0]


def test_absent_entries_may_come_as_often_as_they_like(impl: str) -> None:
    rows = make("soft", 2, 40)
    ids = torch.full((2, 9), -1)
    _, events, grad = solve(impl, rows, ids, slopes_for(ids))
    assert (events[:, :-1] == -INF).all()
    torch.testing.assert_close(events[:, -1], torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, slopes_for(ids)[:, -1:] * rows.student.softmax(-1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_row_may_be_computed_in_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does where there are few rows; some parts hold no named id, some nothing but shared or unshared ones."""
    kernels = pytest.importorskip("fastkd_kernels.logit")
    monkeypatch.setattr(kernels, "_parts", lambda *_: parts)
    for option in ("hard_2", "a_third_shared", "weights_of_0"):
        rows = make(option, 2, 170)
        ids = names(rows, 20)
        check("triton", rows, ids)
        near = torch.arange(20).expand(2, 20).contiguous()
        check("triton", rows, near)


@pytest.mark.native
def test_threads_do_not_change_a_bit() -> None:
    rows = make("hard_2", 40, 3000)
    ids = names(rows, 64)
    one = solve("native", rows, ids, slopes_for(ids))
    torch.set_num_threads(2)
    try:
        two = solve("native", replace(rows), ids, slopes_for(ids))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_alone(impl: str) -> None:
    rows = make("by_row", 3, 97)
    ids, slopes = names(rows, 20), slopes_for(names(rows, 20))
    before = [x.clone() for x in (rows.student, rows.target, rows.row_weight, rows.alpha, ids, slopes)]
    solve(impl, rows, ids, slopes)
    for x, was in zip((rows.student, rows.target, rows.row_weight, rows.alpha, ids, slopes), before, strict=True):
        assert torch.equal(x, was)


def test_the_expected_numbers_could_fail() -> None:
    """E is what float32 costs, not a bar that lets anything pass."""
    rows = make("hard_2")
    ids, slopes = names(rows, 40), slopes_for(names(rows, 40))
    _, error = exact_and_error(
        lambda s, c: solve("reference", replace(rows, student=s), ids, c)[1:], rows.student, slopes
    )
    assert all(float(e.max()) < 1e-5 for e in error)
