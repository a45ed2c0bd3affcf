"""Losses on attention scores in the autograd graph, in other tools, and as MiniLM's relations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_problems import PLAIN, naive
from torch import Tensor

import fastkd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(impl: str) -> tuple[Tensor, ...]:
    device = "cpu" if impl != "triton" else DEVICE
    small = replace(PLAIN, batch=1, heads=1, student_groups=1, teacher_groups=1)
    return tuple(x.to(device) for x in small.tensors())


def test_retained_graph_twice_with_different_grad_output(impl: str) -> None:
    q_s, k_s, q_t, k_t = problem(impl)
    leaves = q_s.requires_grad_(), k_s.requires_grad_()
    loss = fastkd.attention_kl_loss(*leaves, q_t, k_t, reduction="none", impl=impl)
    first = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.full_like(loss, -2), retain_graph=True)
    again = torch.autograd.grad(loss.sum(), leaves)  # an upstream of stride 0
    for a, b, c in zip(first, second, again, strict=True):
        torch.testing.assert_close(b, -2 * a, rtol=1e-5, atol=1e-7)
        assert torch.equal(a, c)
        assert float(a.abs().max()) > 1e-3


def test_inputs_are_not_changed_and_the_teacher_gets_no_gradient(impl: str) -> None:
    tensors = problem(impl)
    before = [x.clone() for x in tensors]
    for x in tensors:
        x.requires_grad_()
    fastkd.attention_kl_loss(*tensors, causal=True, impl=impl).backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert [x.grad is None for x in tensors] == [False, False, True, True]
    q_s, k_s, q_t, k_t = (x.detach() for x in tensors)
    assert not fastkd.attention_kl_loss(q_s, k_s, q_t.requires_grad_(), k_t, impl=impl).requires_grad


def test_no_graph(impl: str) -> None:
    q_s, k_s, q_t, k_t = problem(impl)
    with torch.no_grad():
        assert not fastkd.attention_kl_loss(q_s.requires_grad_(), k_s, q_t, k_t, impl=impl).requires_grad
    with torch.inference_mode():
        assert fastkd.attention_kl_loss(q_s.detach(), k_s.clone(), q_t, k_t.clone(), impl=impl).isfinite()


def test_what_was_made_under_inference_mode(impl: str) -> None:
    """A teacher's forward runs there, in many loops, and autograd refuses to save its tensors."""
    q_s, k_s, q_t, k_t = problem(impl)
    mask = torch.arange(21, device=q_s.device)[None] < 15
    leaf = q_s.requires_grad_()
    want = fastkd.attention_kl_loss(leaf, k_s, q_t, k_t, key_mask=mask, impl=impl)
    with torch.inference_mode():
        teacher, inferred = (q_t.clone(), k_t.clone()), mask.clone()
    got = fastkd.attention_kl_loss(leaf, k_s, *teacher, key_mask=inferred, impl=impl)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, leaf)[0])


def test_what_is_modified_before_backward_is_noticed() -> None:
    for changed in range(4):
        tensors = [x.clone() for x in PLAIN.tensors()]
        loss = fastkd.attention_kl_loss(tensors[0] * 1, tensors[1].requires_grad_(), *tensors[2:])
        with torch.no_grad():
            tensors[changed].add_(1) if changed else None
        if changed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_second_derivatives_raise(impl: str) -> None:
    q_s, k_s, q_t, k_t = problem(impl)
    for keys in (k_s, None):
        leaf = q_s.clone().requires_grad_()
        loss = fastkd.attention_kl_loss(leaf, leaf if keys is None else keys, q_t, k_t, impl=impl)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        for differentiate in (lambda x: x.backward(retain_graph=True), lambda x: torch.autograd.grad(x, leaf)):  # noqa: B023
            with pytest.raises(RuntimeError, match="fastkd: its losses have no second derivative"):
                differentiate(loss + grad.square().sum())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of forward mode
def test_vmap_and_forward_mode_raise() -> None:
    q_s, k_s, q_t, k_t = PLAIN.tensors()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(fastkd.attention_kl_loss)(*(x.unsqueeze(0) for x in (q_s, k_s, q_t, k_t)))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda q: fastkd.attention_kl_loss(q, k_s, q_t, k_t), (q_s,), (q_s,))
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        forward_ad.unpack_dual(fastkd.attention_kl_loss(forward_ad.make_dual(q_s, q_s), k_s, q_t, k_t))


def test_autocast_does_not_round(impl: str) -> None:
    q_s, k_s, q_t, k_t = problem(impl)
    leaf = q_s.requires_grad_()
    want = fastkd.attention_kl_loss(leaf, k_s, q_t, k_t, impl=impl)
    with torch.autocast(q_s.device.type, torch.bfloat16):
        got = fastkd.attention_kl_loss(leaf, k_s, q_t, k_t, impl=impl)
        (grad,) = torch.autograd.grad(got, leaf)
    assert torch.equal(got, want)
    assert torch.equal(grad, torch.autograd.grad(want, leaf)[0])


def test_checkpoint(impl: str) -> None:
    from torch.utils.checkpoint import checkpoint

    q_s, k_s, q_t, k_t = problem(impl)
    leaf = q_s.requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return fastkd.attention_kl_loss(q * 2, k_s, q_t, k_t, impl=impl)

    (want,) = torch.autograd.grad(loss(leaf), leaf)
    (got,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert torch.equal(got, want)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal rows": {"causal": True, "reduction": "none"},
    "masked": {"key_mask": torch.arange(42).view(2, 21) % 3 > 0, "reduction": "batchmean"},
    "relations": {"relation_heads": 4},
}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_compile(call: str, same: bool) -> None:
    """In one graph, with the bits of the eager call, gradients included."""
    options = CALLS[call]
    q_s, k_s, q_t, k_t = PLAIN.tensors()

    def step(q: Tensor, k: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        q = q * 2
        return fastkd.attention_kl_loss(q, q if same else k, q_t, q_t if same else k_t, **options).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaves = q_s.clone().requires_grad_(), k_s.clone().requires_grad_(not same)
        loss = run(*leaves, q_t, k_t)
        loss.backward()
        results.append((loss.detach(), *(x.grad for x in leaves if x.requires_grad)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_compile_serves_every_batch_with_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fastkd.attention_kl_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (21, 22, 30):
            tensors = replace(PLAIN, batch=3, queries=tokens, keys=tokens).tensors()
            assert torch.equal(compiled(*tensors), fastkd.attention_kl_loss(*tensors))


def test_export() -> None:
    class Distil(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return fastkd.attention_kl_loss(*tensors, causal=True)

    tensors = PLAIN.tensors()
    exported = torch.export.export(Distil(), tensors)
    assert torch.equal(exported.module()(*tensors), fastkd.attention_kl_loss(*tensors, causal=True))


def test_operators_pass_opcheck() -> None:
    tensors = PLAIN.tensors()
    mask = torch.ones(2, 21, dtype=torch.bool)
    rest = (mask, None, True, 0.3, 0.2, None, False, None)
    for keys in (tensors[1].requires_grad_(), None):
        arguments = (tensors[0].requires_grad_(), keys, *tensors[2:], *rest)
        torch.library.opcheck(torch.ops.fastkd.attention_forward.default, arguments)


def test_a_lazy_minus_sign() -> None:
    q_s, k_s, q_t, k_t = PLAIN.tensors()
    negative = torch.complex(q_s, -q_t[..., :8]).conj().imag
    assert negative.is_neg()
    got = fastkd.attention_kl_loss(negative, k_s, q_t, k_t)
    assert torch.equal(got, fastkd.attention_kl_loss(negative.resolve_neg(), k_s, q_t, k_t))


def split(x: Tensor, heads: int) -> Tensor:
    tokens = x.transpose(1, 2).flatten(2)
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def test_minilm_is_the_papers_formula(impl: str) -> None:
    """1 / (A |x|) sum_a sum_t KL, scores over the square root of a relation head's size; added over Q, K and V."""
    device = "cpu" if impl != "triton" else DEVICE
    heads = 2 if impl == "triton" else 8
    student = [torch.randn(2, n, 10, 16, device=device) for n in (4, 2, 2)]
    teacher = [torch.randn(2, n, 10, 8, device=device) for n in (6, 2, 4)]
    want = torch.zeros((), dtype=torch.float64)
    for x, y in zip(student, teacher, strict=True):
        log_q, log_p = (
            F.log_softmax(z @ z.mT / z.shape[-1] ** 0.5, -1)
            for z in (split(x.double(), heads), split(y.double(), heads))
        )
        want += (log_p.exp() * (log_p - log_q)).sum().cpu() / (heads * 10) / 2
    leaves = [x.requires_grad_() for x in student]
    got = fastkd.minilm_loss(leaves, teacher, relation_heads=heads, impl=impl)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=0)
    assert all(
        x is not None and x.shape == y.shape for x, y in zip(torch.autograd.grad(got, leaves), leaves, strict=True)
    )


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_relation_of_weight_0_may_hold_anything(reduction: str, weights: tuple[float, float]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)
    student[1], teacher[1] = torch.nan, torch.inf
    leaves = [x.clone().requires_grad_() for x in student]
    loss = fastkd.minilm_loss(leaves, list(teacher), relation_heads=2, weights=weights, reduction=reduction)
    leaf = student[0].clone().requires_grad_()
    alone = weights[0] * fastkd.minilm_loss([leaf], [teacher[0]], relation_heads=2, reduction=reduction)
    torch.testing.assert_close(loss, alone)
    loss.sum().backward()
    alone.sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaf.grad)
    assert torch.equal(leaves[1].grad, torch.zeros_like(student[1]))


def test_minilm_masks_weights_and_rows() -> None:
    student, teacher = torch.randn(3, 2, 4, 9, 16).unbind(), torch.randn(3, 2, 6, 9, 8).unbind()
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    rows = fastkd.minilm_loss(student, teacher, relation_heads=4, weights=(1, 0, 0.5), mask=mask, reduction="none")
    assert rows.shape == (2, 4, 9)
    want = torch.zeros(2, 4, 9, dtype=torch.float64)
    for weight, x, y in zip((1, 0, 0.5), student, teacher, strict=True):
        x, y = split(x.double(), 4), split(y.double(), 4)
        want += weight * naive(x, x, y, y, key_mask=mask, query_mask=mask)[0]
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-6)
    alone = fastkd.minilm_loss(student, teacher, relation_heads=4, weights=(1, 0, 0.5), mask=mask)
    torch.testing.assert_close(alone, rows.sum() / (4 * 14))
    flat = fastkd.minilm_loss([x[0] for x in student], [x[0] for x in teacher], relation_heads=4, reduction="none")
    assert flat.shape == (4, 9)


def test_memory_grows_with_tokens_alone() -> None:
    """What backward keeps: what it was given, and five numbers a row."""
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    q, k = torch.randn(2, 1, 2, 300, 16).unbind()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = fastkd.attention_kl_loss(q.requires_grad_(), k.requires_grad_(), q.detach() + 1, k.detach())
    assert kept == 4 * q.numel()
    loss.backward()
