"""Parts of the backward matmuls that are left out, because no gradient there is worth anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import Head, kd_loss
from fastkd.losses._filter import ROWS, TILE, kept

N, V, H = 2 * ROWS + 5, 3 * TILE + 100, 64
WEIGHTS = torch.linspace(0.5, 3, N)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Students certain of ids in the first tile, or, from the second block of rows on, in the last but one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator)
    ids = torch.arange(N) % 50 + torch.where(torch.arange(N) < ROWS, 0, 2 * TILE)
    hidden = 5 * weight[ids] / weight[ids].norm(dim=1, keepdim=True)
    teacher = torch.randn(N, V, generator=generator) * 0.1 + hidden @ weight.T
    return hidden.to(dtype), weight.to(dtype), teacher, ids


def gradients(eps: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    hidden, weight, teacher, ids = problem(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = kd_loss(Head(hidden, weight, scale=0.5, filter_eps=eps), teacher, ids, row_weight=WEIGHTS, normalizer=7.0)
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0))
    return of_hidden, of_weight


def logit_gradients() -> Tensor:
    """In units of probability: before row weights, normalizer and upstream gradient."""
    hidden, weight, teacher, ids = (x.double() if x.is_floating_point() else x for x in problem())
    logits = Head(hidden, weight, scale=0.5).logits().requires_grad_()
    return torch.autograd.grad(kd_loss(logits, teacher, ids, reduction="sum"), logits)[0]


@pytest.mark.parametrize("eps", [1e-7, 1e-5, 1e-3, 1e-2])
def test_error_bound(eps: float) -> None:
    exact, got = gradients(0.0), gradients(eps)
    unit = WEIGHTS / 7 * 2
    small = logit_gradients().abs() <= eps
    left_out, error_of_weight = torch.zeros(N, V), torch.zeros(V, H)
    hidden, weight, *_ = problem()
    for block in range(0, N, ROWS):
        for tile in range(0, V, TILE):
            part = slice(block, block + ROWS), slice(tile, tile + TILE)
            left_out[part] = float(small[part].all())
            error_of_weight[part[1]] += left_out[part][0, 0] * eps * 0.5 * (unit[part[0]] @ hidden[part[0]].abs())
    bound = eps * 0.5 * unit.unsqueeze(1) * (left_out @ weight.abs())
    rounding = [1e-5 * x.abs().amax() for x in exact]
    assert bool(((got[0] - exact[0]).abs() <= bound * 1.001 + rounding[0]).all())
    assert bool(((got[1] - exact[1]).abs() <= error_of_weight * 1.001 + rounding[1]).all())
    assert (float(left_out.mean()) > 0.2) == (eps >= 1e-3), "what is left out decides whether this test can fail"


def test_nothing_is_left_out_by_default() -> None:
    for one, other in zip(gradients(0.0), gradients(1e-30), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_matmuls_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    multiply = torch.addmm

    def counted(total: Tensor, one: Tensor, other: Tensor, **options: Any) -> Tensor:
        products.append(one.numel() * other.shape[1])
        return multiply(total, one, other, **options)

    monkeypatch.setattr(torch, "addmm", counted)
    gradients(0.0)
    assert sum(products) == 3 * N * V * H
    products.clear()
    gradients(1e-3)
    assert N * V * H < sum(products) < 2.5 * N * V * H


def test_16_bit_operands() -> None:
    for one, other in zip(gradients(1e-6, torch.bfloat16), gradients(0.0, torch.bfloat16), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-4)


def test_what_is_kept() -> None:
    gradient, unit = torch.zeros(2, V), torch.tensor([1.0, 100.0])
    assert kept(gradient, unit, 0.5) == []
    gradient[0, TILE - 1], gradient[1, TILE] = -0.6, 49.0
    assert kept(gradient, unit, 0.5) == [slice(0, TILE)]
    gradient[1, TILE], gradient[0, V - 1] = 51.0, float("nan")
    assert kept(gradient, unit, 0.5) == [slice(0, 2 * TILE), slice(3 * TILE, V)]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Head: filter_eps must be finite and not negative, got -1.0"):
        Head(torch.zeros(2, 3), torch.zeros(4, 3), filter_eps=-1.0)
    with pytest.raises(RuntimeError, match="Head: filter_eps runs on a CPU alone"):
        Head(torch.zeros(2, 3, device="meta"), torch.zeros(4, 3, device="meta"), filter_eps=1e-6)
