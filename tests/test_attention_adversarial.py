"""Inputs that break attention distillation elsewhere, each by name, for every implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_problems import PLAIN, STORAGE, computed, expected
from torch import Tensor

import fastkd
from fastkd import testing

INF, NAN = float("inf"), float("nan")
CAUSAL = replace(PLAIN, causal=True)
ONE = replace(PLAIN, batch=1)  # enough where sequences do not matter, and interpreters take their time


def assert_judged(impl: str, tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Within the bar of what people write, in float64; returns what came out."""
    got = computed(impl, tensors, options)
    testing.assert_as_exact_as_fp32(got, lambda *x: expected(x, options), *tensors)
    assert all(bool(x.isfinite().all()) for x in got)
    return got


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_teacher_equal_to_student(impl: str, dtype: torch.dtype) -> None:
    q, k = replace(ONE, sharp=4.0).tensors(dtype)[:2]
    losses, *gradients = computed(impl, (q, k, q.clone(), k.clone()), {"causal": True})
    assert float(losses.abs().max()) < 1e-6
    assert not any(bool(x.any()) for x in gradients), "p - p is 0, and nothing is left of it"


def test_gaps_of_1e4(impl: str) -> None:
    """One key far above the others, on either side: one-hot attention."""
    q_s, k_s, q_t, k_t = ONE.tensors()
    q_s[..., 0], k_s[..., 3, 0] = 100.0, 280.0
    q_t[..., 0], k_t[..., 7, 0] = 100.0, 340.0
    losses, *_ = assert_judged(impl, (q_s, k_s, q_t, k_t))
    assert float(losses.min()) > 1e3
    k_t[..., 7, 0], k_t[..., 3, 0] = 0.0, 340.0
    assert_judged(impl, (q_s, k_s, q_t, k_t), causal=True)


def test_far_scores_that_differ_little(impl: str) -> None:
    """Maxima and logarithms of sums are kept apart: added, they would lose what the scores differ by."""
    q_s, k_s, q_t, k_t = ONE.tensors()
    for q, k in ((q_s, k_s), (q_t, k_t)):
        q[..., 0], k[..., 0] = 64.0, 512.0
    assert_judged(impl, (q_s, k_s, q_t, k_t))


def test_largest_scores_so_late(impl: str) -> None:
    """Keys in ascending order of their scores: the running maxima move in every tile."""
    q_s, k_s, q_t, k_t = (x.abs() for x in ONE.tensors())
    ramp = torch.linspace(0, 6, 21)[:, None]
    assert_judged(impl, (q_s, k_s + ramp, q_t, k_t + ramp), causal=True)
    assert_judged(impl, (q_s, k_s + ramp, q_t, k_t - ramp))


def test_zero_queries(impl: str) -> None:
    q_s, k_s, q_t, k_t = ONE.tensors()
    assert_judged(impl, (torch.zeros_like(q_s), k_s, q_t, k_t))
    assert_judged(impl, (q_s, k_s, torch.zeros_like(q_t), k_t))
    losses, *gradients = computed(impl, (q_s * 0, k_s, q_t * 0, k_t), {})
    assert float(losses.abs().max()) < 1e-6
    assert not any(bool(x.any()) for x in gradients)


def test_half_precision_at_its_limits(impl: str) -> None:
    """Products beyond float16's range."""
    q_s, k_s, q_t, k_t = replace(ONE, dim=8, teacher_dim=8).tensors(torch.float16)
    assert_judged(impl, (q_s * 250, k_s * 2000, q_t * 4000, k_t * 100), scale=1e-5, teacher_scale=2e-5)


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("masks", [("key_mask",), ("query_mask",), ("key_mask", "query_mask")])
@pytest.mark.parametrize("causal", [False, True])
def test_what_masks_drop_may_hold_anything(impl: str, causal: bool, masks: tuple[str, ...]) -> None:
    problem = replace(PLAIN, causal=causal, masked=True)
    tensors, options = problem.tensors(), problem.options()
    options = {name: x for name, x in options.items() if name in (*masks, "causal")}
    want = computed(impl, tensors, options)
    for poison in (NAN, INF, -INF) if impl != "triton" else (NAN,):
        q_s, k_s, q_t, k_t = (x.clone() for x in tensors)
        for name, given in (("key_mask", (k_s, k_t)), ("query_mask", (q_s, q_t))):
            for x in given if name in masks else ():
                x.masked_fill_(~options[name][:, None, :, None], poison)
        got = computed(impl, (q_s, k_s, q_t, k_t), options)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    if "query_mask" in masks:
        assert not bool(want[1].reshape(2, 2, 21, -1).movedim(2, 1)[~options["query_mask"]].any())
    if "key_mask" in masks:
        assert not bool(want[2].reshape(2, 2, 21, -1).movedim(2, 1)[~options["key_mask"]].any())


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("causal", [True, False])
def test_everything_masked(impl: str, causal: bool) -> None:
    """Of one sequence, so that the other counts as if it were alone; and of both."""
    tensors = replace(PLAIN, heads=1, student_groups=1, teacher_groups=1).tensors()
    mask = torch.tensor([[False], [True]]).expand(2, 21)
    for name in ("key_mask", "query_mask"):
        got = computed(impl, tensors, {"causal": causal, name: mask})
        want = computed(impl, tensors, {"causal": causal})
        for x, y in zip(got, want, strict=True):
            half = len(x) // 2
            assert not bool(x[:half].any())
            if name == "query_mask":
                torch.testing.assert_close(x[half:] != 0, y[half:] != 0)
        assert not any(bool(x.any()) for x in computed(impl, tensors, {"causal": causal, name: mask & False}))


@pytest.mark.few_interpreted(5)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_query_of_nan_harms_no_other(impl: str, side: str, poison: float) -> None:
    tensors = tuple(x.clone() for x in CAUSAL.tensors())
    want = [x.reshape(2, 2, 21, -1) for x in computed(impl, tensors, {"causal": True})]
    tensors[0 if side == "student" else 2][1, 0, 6, 2] = poison
    losses, of_queries, of_keys = (x.reshape(2, 2, 21, -1) for x in computed(impl, tensors, {"causal": True}))
    bad = torch.zeros(2, 2, 21, dtype=torch.bool)
    bad[1, 0, 6] = True
    for got, clean in ((losses, want[0]), (of_queries, want[1])):
        assert bool(got[bad].isnan().all())
        assert torch.equal(got[~bad], clean[~bad])
    assert bool(of_keys[1, 0, :7].isnan().all()), "the keys that it sees get their share of it"
    assert torch.equal(of_keys[1, 0, 7:], want[2][1, 0, 7:])
    assert torch.equal(of_keys[0], want[2][0])
    assert torch.equal(of_keys[1, 1], want[2][1, 1])


@pytest.mark.few_interpreted(5)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_key_of_nan_harms_those_that_see_it(impl: str, side: str, poison: float) -> None:
    tensors = tuple(x.clone() for x in CAUSAL.tensors())
    want = [x.reshape(2, 2, 21, -1) for x in computed(impl, tensors, {"causal": True})]
    tensors[1 if side == "student" else 3][1, 0, 6, 2] = poison
    losses, of_queries, of_keys = (x.reshape(2, 2, 21, -1) for x in computed(impl, tensors, {"causal": True}))
    for got, clean in ((losses, want[0]), (of_queries, want[1])):
        assert bool(got[1, 0, 6:].isnan().all())
        assert torch.equal(got[1, 0, :6], clean[1, 0, :6])
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1, 1], clean[1, 1])
    assert bool(of_keys[1, 0].isnan().all()), "all that those rows see"
    assert torch.equal(of_keys[0], want[2][0])


@pytest.mark.parametrize("sizes", [{"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}, {"batch": 0}], ids=str)
def test_nothing(impl: str, sizes: dict[str, int]) -> None:
    """No token, no sequence: no row counts."""
    problem = replace(PLAIN, **sizes)
    losses, of_queries, of_keys = computed(impl, problem.tensors(), {})
    assert losses.shape == (problem.batch * 2 * problem.queries,)
    assert of_queries.shape == (len(losses), 8)
    assert of_keys.shape == (problem.batch * 2 * problem.keys, 8)
    assert not any(bool(x.any()) for x in (losses, of_queries, of_keys))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_no_row_counts(impl: str, reduction: str) -> None:
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q_s, k_s, q_t, k_t = (x.to(device) for x in PLAIN.tensors())
    q_s[:] = NAN
    mask = torch.zeros(2, 21, dtype=torch.bool, device=device)
    leaf = q_s.requires_grad_()
    loss = fastkd.attention_kl_loss(leaf, k_s, q_t, k_t, query_mask=mask, reduction=reduction, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None
    assert not bool(leaf.grad.any())


def test_gradients_are_bounded(impl: str) -> None:
    """|dL/dq| <= 2 scale max |k|, whatever the scores are."""
    q_s, k_s, q_t, k_t = ONE.tensors()
    for spread in (1e3, 1e-6):
        losses, of_queries, _ = computed(impl, (q_s * spread, k_s, q_t, k_t * spread), {"scale": 1.0})
        assert bool((losses >= -1e-6).all())
        assert bool(losses.isfinite().all())
        assert float(of_queries.abs().max()) <= 2 * 1.5 * float(k_s.abs().max()) + 1e-3
