"""Rows that no number can come of, rows that do not count, and ids that are wrong: for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from topk_problems import make, names, slopes_for, solve
from torch import Tensor

INF, NAN = float("inf"), float("nan")


SPOILT: dict[str, Callable[[Tensor, Tensor], None]] = {
    "nan in the tail": lambda x, ids: x.index_fill_(0, _other(x, ids), NAN),
    "nan among the ids": lambda x, ids: x.index_fill_(0, ids[2:3], NAN),
    "inf in the tail": lambda x, ids: x.index_fill_(0, _other(x, ids), INF),
    "inf among the ids": lambda x, ids: x.index_fill_(0, ids[2:3], INF),
    "nothing finite": lambda x, ids: x.fill_(-INF),
}


def _other(x: Tensor, ids: Tensor) -> Tensor:
    return torch.tensor([next(j for j in range(60, len(x)) if j not in ids.tolist())])


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("option", ["soft", "hard", "hard_2"])
def test_an_unusable_row_is_nan_and_harms_no_other(impl: str, option: str, spoilt: str) -> None:
    rows = make(option, 3, 97)
    ids, slopes = names(rows, 20), slopes_for(names(rows, 20))
    want = solve(impl, rows, ids, slopes)
    SPOILT[spoilt](rows.student[1], ids[1])
    slopes[1] = NAN  # what becomes of events that are
    state, events, grad = solve(impl, rows, ids, slopes)
    assert events[1].isnan().all()
    assert grad[1].isnan().all()
    for got, expected in zip((state, events, grad), want, strict=True):
        assert torch.equal(got[::2], expected[::2])
    slopes[1] = 0.0  # and where the weights leave nothing
    rows = replace(rows, alpha=torch.tensor([rows.alpha, 0.0, rows.alpha]))
    assert (solve(impl, rows, ids, slopes)[2][1] == 0).all()


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("option", ["soft", "soft_shared", "a_third_shared"])
@pytest.mark.parametrize("event", [0, 3, -1])
def test_a_nan_slope_makes_its_row_nan(impl: str, option: str, event: int) -> None:
    rows = make(option, 3, 97)
    ids, slopes = names(rows, 20), slopes_for(names(rows, 20))
    want = solve(impl, rows, ids, slopes)[2]
    slopes[1, event] = NAN
    grad = solve(impl, rows, ids, slopes)[2]
    assert grad[1].isnan().all()
    assert torch.equal(grad[::2], want[::2])
    rows = replace(rows, row_weight=torch.tensor([1.0, 0.0, 1.0]))
    assert (solve(impl, rows, ids, slopes)[2][1] == 0).all()


def test_a_row_that_does_not_count_may_hold_anything(impl: str) -> None:
    rows = make("hard_2", 4, 97)
    rows.row_weight, rows.agreement = torch.tensor([1.0, 0.0, 1.0, 1.0]), True
    rows.target[2] = -100
    ids, slopes = names(rows, 20), slopes_for(names(rows, 20))
    best = ids[:, 0].clone()
    want = solve(impl, rows, ids, slopes, best)
    rows.student[1:3], ids[1], ids[2, :3], slopes[1:3] = NAN, 5, torch.tensor([97, -2, 2**40]), NAN
    got = solve(impl, rows, ids, slopes, best)
    for one, expected in zip(got, want, strict=True):
        assert torch.equal(one, expected)
    for one in got:
        assert (one[1:3] == 0).all()
    assert got[2][::3].abs().amax(-1).min() > 1e-3


def test_a_term_of_weight_0_is_not_looked_at(impl: str) -> None:
    """alpha 1: neither temperature nor slopes; alpha 0: nor what stands beyond the shared ids."""
    rows = replace(make("a_third_shared", 2, 97), alpha=torch.tensor([1.0, 0.0]))
    ids, slopes = names(rows, 10), slopes_for(names(rows, 10))
    want = solve(impl, rows, ids, slopes)
    rows.student[1, rows.shared :], slopes[0] = NAN, NAN
    for one, expected in zip(solve(impl, rows, ids, slopes), want, strict=True):
        assert torch.equal(one, expected)
    assert (want[1][0] == 0).all()


WRONG = {
    "below": ([4, -2, 7], r"hold ids from 0 to 89 \(or -1 for none\), got -2"),
    "above": ([90, 3, 3], r"hold ids from 0 to 89 \(or -1 for none\), got 90"),
    "far": ([1, 2**40, 3], rf"hold ids from 0 to 89 \(or -1 for none\), got {2**40}"),
    "twice": ([-1, 5, 5], "hold every id once in a row, got 5 twice"),
    "first twice": ([89, -1, 89], "hold every id once in a row, got 89 twice"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_ids(impl: str, wrong: str) -> None:
    """On the CPU an error; on a GPU NaN in their row alone."""
    rows = replace(make("hard", 3, 97), shared=90)
    ids, slopes = names(rows, 3), slopes_for(names(rows, 3))
    want = solve(impl, rows, ids, slopes)
    ids[1] = torch.tensor(WRONG[wrong][0])
    if impl == "triton":
        slopes[1] = NAN
        _, events, grad = solve(impl, rows, ids, slopes)
        assert events[1].isnan().all()
        assert grad[1].isnan().all()
        assert torch.equal(events[::2], want[1][::2])
        assert torch.equal(grad[::2], want[2][::2])
        return
    ids[2] = -3
    with pytest.raises(ValueError, match=f"^kd_loss: teacher must {WRONG[wrong][1]}$"):
        solve(impl, rows, ids, slopes)


def test_rows_may_name_what_others_name(impl: str) -> None:
    """Twice is twice in one row, and found after rows that are right."""
    rows = make("soft", 4, 97)
    ids = torch.tensor([[7, 3, -1]]).repeat(4, 1)
    assert solve(impl, rows, ids, slopes_for(ids))[1].isfinite().sum() == 12
    if impl != "triton":
        ids[3] = torch.tensor([3, 7, 3])
        with pytest.raises(ValueError, match=r"got 3 twice$"):
            solve(impl, rows, ids, slopes_for(ids))


def test_labels_and_temperatures_are_checked_too(impl: str) -> None:
    if impl == "triton":
        pytest.skip("a GPU says NaN")
    rows = make("hard", 3, 97)
    rows.target[1] = 97
    ids = names(rows, 3)
    with pytest.raises(ValueError, match=r"^kd_loss: target must hold ids from 0 to 96, or ignore_index=-100, got 97$"):
        solve(impl, rows, ids, slopes_for(ids))
    rows = replace(make("soft", 3, 97), temperature=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"^kd_loss: temperature must be positive and finite in every row, got -1\.0$"):
        solve(impl, rows, ids, slopes_for(ids))
