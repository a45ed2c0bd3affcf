"""Losses over heads on inputs that break losses: masks, NaN, huge and equal rows, odd layouts, nothing that counts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_problems import device_of
from logit_problems import DIVERGENCES
from torch import Tensor

import fastkd
from fastkd import Head
from fastkd.testing import assert_as_exact_as_fp32

N, H, V = 5, 6, 37
NAN, INF = float("nan"), float("inf")
Tensors = tuple[Tensor, ...]


@pytest.fixture
def tensors() -> Tensors:
    """Input, weight and bias of the student, then of the teacher."""
    student = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    return (*student, torch.randn(N, 3), torch.randn(V, 3), torch.randn(V))


def run(impl: str, tensors: Tensors, student: dict[str, Any], teacher: dict[str, Any], **options: Any) -> Tensors:
    """Loss and gradients of the student's tensors through heads."""
    device = device_of(impl)
    moved = [x.detach().to(device) for x in tensors]
    leaves = [x.requires_grad_() for x in moved[:3]]
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    heads = (Head(*moved[:3], workspace=2 * 2 * V * 4, **student), Head(*moved[3:], **teacher))
    loss = fastkd.kd_loss(*heads, impl=impl, **options)
    grads = torch.autograd.grad(loss, leaves, torch.linspace(0.5, 1.5, loss.numel()).to(loss).reshape(loss.shape))
    return loss.detach().cpu(), *(x.cpu() for x in grads)


def judged(impl: str, tensors: Tensors, **options: Any) -> Tensors:
    """Against the losses over logits, which have their own tests: per row, with the bar for all."""
    got = run(impl, tensors, {}, {}, reduction="none", **options)

    def compute(*tensors: Tensor) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        logits = leaves[0] @ leaves[1].t() + leaves[2], tensors[3] @ tensors[4].t() + tensors[5]
        loss = fastkd.kd_loss(*logits, reduction="none", impl="reference", **options)
        hidden, *rest = torch.autograd.grad(loss, leaves, torch.linspace(0.5, 1.5, N).to(loss))
        return loss.detach(), hidden, *(x.unsqueeze(0) for x in rest)

    assert_as_exact_as_fp32((*got[:2], *(x.unsqueeze(0) for x in got[2:])), compute, *tensors)
    return got


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bias_that_masks_ids(impl: str, divergence: str, tensors: Tensors) -> None:
    """The same ids on both sides: they have no probability, and their part of the weight no gradient."""
    tensors[2][10:20] = tensors[5][10:20] = -INF
    loss, *grads = judged(impl, tensors, divergence=divergence, temperature=2.0)
    assert bool(loss.isfinite().all())
    assert bool((grads[1][10:20] == 0).all())
    assert bool((grads[2][10:20] == 0).all())
    assert float(grads[1].abs().max()) > 1e-3


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masks_of_one_side(impl: str, divergence: str, tensors: Tensors) -> None:
    """Infinite losses where the mathematics says so, never NaN, and gradients as those of logits."""
    tensors[2][3] = -INF
    judged(impl, tensors, divergence=divergence)
    tensors[2][3], tensors[5][4] = 0.0, -INF
    judged(impl, tensors, divergence=divergence)


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", "mse"])
def test_huge_hidden_states(impl: str, divergence: str, tensors: Tensors) -> None:
    """Logits thousands apart. Where they overflow, the row is NaN as the row of logits is."""
    hidden = tensors[0] * 1e3
    judged(impl, (hidden, *tensors[1:]), divergence=divergence)
    hidden[2] = 1e38
    loss, of_input, *_ = run(impl, (hidden, tensors[1] * 100, *tensors[2:]), {}, {}, reduction="none")
    others = torch.tensor([0, 1, 3, 4])
    assert bool(loss[2].isnan())
    assert bool(loss[others].isfinite().all())
    assert bool(of_input[others].isfinite().all())


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_rows_and_equal_models(impl: str, divergence: str, tensors: Tensors) -> None:
    hidden, weight, bias = tensors[:3]
    same = hidden[:1].expand(N, H).contiguous()
    loss, of_input, *_ = run(impl, (same, weight, bias, *tensors[3:]), {}, {}, divergence=divergence, reduction="none")
    assert bool(of_input.isfinite().all())
    loss, *grads = run(impl, (hidden, weight, bias) * 2, {}, {}, divergence=divergence, reduction="none")
    if divergence != "cross_entropy":
        assert float(loss.abs().max()) < 1e-5
    if divergence not in ("cross_entropy", "tvd"):  # tvd has a kink there
        assert all(float(x.abs().max()) < 1e-4 for x in grads)


POISONS = {"nan": NAN, "inf": INF, "huge": 1e38}
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "softcap": {"softcap": 5.0}, "scale": {"scale": -2.0}}


@pytest.mark.few_interpreted(9)
@pytest.mark.parametrize("why", ["target", "row_weight"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("compact", [None, True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_row_that_does_not_count_may_hold_anything(
    impl: str, reduction: str, compact: bool | None, head: str, poison: str, why: str, tensors: Tensors
) -> None:
    if impl == "triton" and not torch.cuda.is_available() and poison != "nan":
        pytest.skip("interpreted: one poison")
    target, weight = torch.tensor([3, 1, 0, 36, 7]), torch.ones(N)
    if why == "target":
        target[1] = -100
    else:
        weight[1] = 0
    options = {"target": target, "row_weight": weight, "reduction": reduction}
    side = {**HEADS[head], "compact": compact}
    want = run(impl, tensors, side, side, **options)
    poisoned = [x.clone() for x in tensors]
    poisoned[0][1] = poisoned[3][1] = POISONS[poison]
    got = run(impl, tuple(poisoned), side, side, **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert bool((got[1][1] == 0).all())


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("poison", POISONS)
def test_one_nan_row_harms_no_other(impl: str, poison: str, head: str, tensors: Tensors) -> None:
    """Its own loss and the gradient of its own hidden state; the weight's is a sum in which it counts."""
    if head == "softcap" and poison != "nan":
        pytest.skip("finite")
    poisoned = [x.clone() for x in tensors]
    poisoned[0][2] = POISONS[poison]
    want = run(impl, tensors, HEADS[head], {}, reduction="none")
    got = run(impl, tuple(poisoned), HEADS[head], {}, reduction="none")
    others = torch.tensor([0, 1, 3, 4])
    assert bool(got[0][2].isnan())
    assert torch.equal(got[0][others], want[0][others])
    assert torch.equal(got[1][others], want[1][others])


def test_a_nan_row_of_a_teacher(impl: str, tensors: Tensors) -> None:
    target = torch.arange(N)
    want = run(impl, tensors, {}, {}, target=target, reduction="none")
    poisoned = [x.clone() for x in tensors]
    poisoned[3][2] = NAN
    got = run(impl, tuple(poisoned), {}, {}, target=target, reduction="none")
    others = torch.tensor([0, 1, 3, 4])
    assert bool(got[0][2].isnan())
    assert torch.equal(got[0][others], want[0][others])
    assert torch.equal(got[1][others], want[1][others])
    got = run(impl, tuple(poisoned), {}, {}, target=target, alpha=1.0)
    want = run(impl, tensors, {}, {}, target=target, alpha=1.0)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("compact", [None, True, False])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("why", ["no_row", "all_ignored", "weights_0"])
def test_nothing_that_counts(impl: str, why: str, reduction: str, compact: bool | None, tensors: Tensors) -> None:
    if why == "no_row":
        tensors = (tensors[0][:0], *tensors[1:3], tensors[3][:0], *tensors[4:])
    rows = len(tensors[0])
    options: dict[str, Any] = {"target": torch.full((rows,), -100 if why == "all_ignored" else 1)}
    if why == "weights_0":
        options["row_weight"] = torch.zeros(rows)
    side = {"compact": compact}
    loss, *grads = run(impl, tensors, side, side, reduction=reduction, **options)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert bool((loss == 0).all())
    for grad, tensor in zip(grads, tensors[:3], strict=True):
        assert grad.shape == tensor.shape
        assert bool((grad == 0).all())


@pytest.mark.parametrize("side", ["head", "logits"])
@pytest.mark.parametrize("why", ["normalizer", "normalizer_tensor", "weights_cancel"])
def test_a_divisor_of_0(impl: str, why: str, side: str, tensors: Tensors) -> None:
    """0 with zero gradients, also those that a second backward computes again."""
    device = device_of(impl)
    hidden, weight, *_ = (x.to(device) for x in tensors)
    leaf = (hidden if side == "head" else hidden @ weight.t()).half().requires_grad_()
    options = {
        "normalizer": {"normalizer": 0},
        "normalizer_tensor": {"normalizer": torch.zeros((), device=device)},
        "weights_cancel": {"row_weight": torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0], device=device)},
    }[why]
    teacher = Head(tensors[3].to(device), tensors[4].to(device))
    student = Head(leaf, weight) if side == "head" else leaf
    loss = fastkd.kd_loss(student, teacher, impl=impl, **options)  # type: ignore[call-overload]
    assert float(loss.detach()) == 0
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert bool((grad == 0).all())


def test_one_row_without_a_leading_dimension(impl: str, tensors: Tensors) -> None:
    """Hidden states of shape (H,): the logits of one row, as (V,) logits are."""
    device = device_of(impl)
    hidden, weight, teacher = (x.to(device) for x in (tensors[0][0], tensors[1], tensors[3][0] @ tensors[4].t()))
    leaf = hidden.requires_grad_()
    for reduction in ("none", "mean"):
        loss = fastkd.kd_loss(Head(leaf, weight), teacher, reduction=reduction, impl=impl)
        want = fastkd.kd_loss(F.linear(leaf, weight), teacher, reduction=reduction, impl=impl)
        assert loss.shape == want.shape == ()
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(want, leaf))


def wider(x: Tensor) -> Tensor:
    return torch.cat([x + 50, x, x - 50], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t() if x.ndim == 2 else x,
    "slice_of_a_wider_tensor": wider,
    "stride_2": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "every_other_row": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "lazy_minus_sign": lambda x: torch._neg_view(-x),
    "subclass": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.few_interpreted(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl: str, layout: str, dtype: torch.dtype, tensors: Tensors) -> None:
    plain = tuple(x.to(dtype) for x in tensors)
    target = torch.tensor([1, -100, 3, 4, 0])
    want = run(impl, plain, {}, {}, target=target, reduction="none")
    got = run(impl, tuple(LAYOUTS[layout](x) for x in plain), {}, {}, target=target, reduction="none")
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("expanded", ["input", "weight", "bias"])
def test_expanded_tensors(impl: str, expanded: str, tensors: Tensors) -> None:
    """One hidden state for all tokens, one row for all ids: stride 0 is read, and never written."""
    device = device_of(impl)
    names = ("input", "weight", "bias")
    leaves = {name: x.to(device) for name, x in zip(names, tensors[:3], strict=True)}
    leaves[expanded] = leaves[expanded][:1].clone()
    for x in leaves.values():
        x.requires_grad_()
    parts = dict(leaves)
    parts[expanded] = leaves[expanded].expand(*dict(zip(names, tensors, strict=False))[expanded].shape)
    teacher = torch.randn(N, V, device=device)
    for reduction in ("none", "mean"):
        loss = fastkd.kd_loss(Head(**parts), teacher, reduction=reduction, impl=impl).sum()
        want = fastkd.kd_loss(F.linear(*parts.values()), teacher, reduction=reduction, impl=impl).sum()
        got = torch.autograd.grad(loss, list(leaves.values()))
        torch.testing.assert_close(got, torch.autograd.grad(want, list(leaves.values())), rtol=1e-4, atol=1e-6)


def test_memory_mapped_hidden_states_of_a_teacher(impl: str, tensors: Tensors) -> None:
    """A cache of hidden states on disk, in half precision, read-only or not: no copy is asked for, none is written."""
    with tempfile.NamedTemporaryFile() as file:
        cache = np.memmap(file.name, dtype=np.float16, mode="w+", shape=(N, 3))
        cache[:] = tensors[3].numpy()
        cache.flush()
        taught = torch.from_numpy(np.memmap(file.name, dtype=np.float16, mode="c", shape=(N, 3)))
        want = run(impl, (*tensors[:3], tensors[3].half(), *tensors[4:]), {}, {})
        got = run(impl, (*tensors[:3], taught, *tensors[4:]), {}, {})
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert np.array_equal(np.asarray(cache), tensors[3].half().numpy())


def test_half_precision_gradients_under_a_loss_scale(impl: str) -> None:
    """A mean over many rows has float16 gradients that only a loss scale keeps from 0, beside a teacher's head too."""
    device, rows, scale = device_of(impl), 6, 2.0**16
    student = torch.randn(rows, V, dtype=torch.float16, device=device).requires_grad_()
    teacher = Head(torch.randn(rows, 3, device=device), torch.randn(V, 3, device=device))
    options: dict[str, Any] = {"normalizer": 2.0**16, "reduction": "sum", "temperature": 2.0, "impl": impl}
    (got,) = torch.autograd.grad(fastkd.kd_loss(student, teacher, **options) * scale, student)
    (want,) = torch.autograd.grad(fastkd.kd_loss(student, teacher.logits(), **options) * scale, student)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_half_precision_weights_have_a_float32_sum(impl: str, reduction: str) -> None:
    """Equal contributions, a few rows at a time: in bfloat16 their sum would stop growing at 256 of them."""
    rows, device = (4096, device_of(impl)) if impl != "triton" or torch.cuda.is_available() else (40, "cpu")
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device).requires_grad_()
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16, device=device)
    target = torch.zeros(rows, dtype=torch.long, device=device)
    loss = fastkd.cross_entropy(Head(hidden, weight, workspace=rows), target, reduction=reduction, impl=impl)
    loss.sum().backward()
    want = torch.tensor([[-0.5], [0.5]]) * (rows if reduction == "none" else 1)
    torch.testing.assert_close(weight.grad.float().cpu(), want, rtol=4e-3, atol=0)  # type: ignore[union-attr]
