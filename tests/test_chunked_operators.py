"""Losses that are computed a few rows at a time, or whose teachers have no logits, in compiled and exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import Expected, Head, TopK, kd_loss
from fastkd.losses._logit_arguments import Logits
from fastkd.testing import peaked_logits

N, V, H, K = 6, 60, 8, 7
FEW = 3 * V * 4  # bytes of workspace: a row or two at a time


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, W, B = randn(N, H, seed=0), randn(V, H, seed=1), randn(V, seed=2)
TX, TW = randn(N, 5, seed=3), randn(V, 5, seed=4)
S, T = peaked_logits(N, V), peaked_logits(N, V, seed=1)
Y = torch.tensor([3, 59, -100, 0, 7, 7])
BEST = TopK.from_logits(T, K)
MAPPING = torch.arange(V).flip(0).index_fill(0, torch.tensor([3, 40]), -1)
EXPECTED = Expected.from_teacher(T, W, B)
SHARES = torch.linspace(0, 1, 3 * N).view(N, 3)


def topk(**options: Any) -> TopK:
    return TopK(BEST.indices, BEST.log_probs, **options)


# What is computed of which leaves. Tensors that a graph takes as constants are closed over.
CALLS: dict[str, tuple[tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "head": (
        (X, W, B),
        lambda x, w, b, **kw: kd_loss(Head(x, w, b, scale=0.5, softcap=3.0, workspace=FEW), Head(TX, TW), Y, **kw),
    ),
    "frozen": ((X,), lambda x, **kw: kd_loss(Head(x, W), Head(TX, TW), Y, divergence="tvd", **kw)),
    "teacher_head": ((S,), lambda s, **kw: kd_loss(s, Head(TX, TW), Y, divergence="jsd", **kw)),
    "topk": ((S,), lambda s, **kw: kd_loss(s, topk(), Y, **kw)),
    "uniform": ((S,), lambda s, **kw: kd_loss(s, topk(tail="uniform"), Y, **kw)),
    "mixed": ((S,), lambda s, **kw: kd_loss(s, [topk(), T, Head(TX, TW)], Y, teacher_weight=SHARES, **kw)),
    "student_topk": ((S,), lambda s, **kw: kd_loss(s, T, Y, student_topk=5, divergence="reverse_kl", **kw)),
    "vocab_map": ((S,), lambda s, **kw: kd_loss(s, T, Y, vocab_map=MAPPING, **kw)),
    "mapped_topk": ((S,), lambda s, **kw: kd_loss(s, topk(), Y, vocab_map=MAPPING, **kw)),
    "expected": ((X,), lambda x, **kw: kd_loss(Head(x, W, B), EXPECTED, Y, **kw)),
    "maps": (
        (S,),
        lambda s, **kw: kd_loss(
            s.view(2, 3, V).movedim(-1, 1),
            TopK(BEST.indices.view(2, 3, K), BEST.log_probs.view(2, 3, K)),
            Y.view(2, 3),
            dim=1,
            **kw,
        ),
    ),
}


def value_and_gradients(call: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    loss = call(*leaves)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name: str, reduction: str) -> None:
    """In one graph, bit for bit."""
    leaves, loss = CALLS[name]

    def call(*leaves: Tensor) -> Tensor:
        return loss(*leaves, reduction=reduction)

    want = value_and_gradients(call, leaves)
    torch._dynamo.reset()
    got = value_and_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves)
    assert all(float(x.abs().max()) > 1e-4 for x in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_parts_of_a_compiled_loss(name: str) -> None:
    leaves, loss = CALLS[name]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(loss(*leaves, return_parts=True)[1])

    torch._dynamo.reset()
    for got, want in zip(torch.compile(call, fullgraph=True, backend="eager")(*leaves), call(*leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_one_graph_for_any_number_of_rows() -> None:
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(x: Tensor, w: Tensor, tx: Tensor, y: Tensor) -> Tensor:
        return kd_loss(Head(x, w, workspace=FEW), Head(tx, TW), y)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    for n in (3, 5, 6):
        assert compiled(X[:n], W, TX[:n], Y[:n]) == loss(X[:n], W, TX[:n], Y[:n])
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own
def test_inductor() -> None:
    torch._dynamo.reset()
    leaves, loss = CALLS["head"]
    want, got = (value_and_gradients(call, leaves) for call in (loss, torch.compile(loss, fullgraph=True)))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_export() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kd_loss(Head(x, W), Head(TX, TW), Y)

    program = torch.export.export(Model(), (X,))
    assert program.module()(X) == Model()(X)


class Recorded(TorchDispatchMode):
    """The arguments of the operators that were called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.arguments = name, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.name in str(function):
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["head", "mixed", "mapped_topk", "expected", "student_topk"])
def test_opcheck(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fake operators promise, and what the graph differentiates, is what the real ones give."""
    monkeypatch.setattr(Logits, "lie_in_memory", lambda self: False)
    leaves, loss = CALLS[name]
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    with Recorded("chunked_forward") as mode:
        loss(*leaves, reduction=reduction)
    (arguments,) = mode.arguments
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastkd.chunked_forward.default, arguments, test_utils=tests)
    if reduction == "none":
        with torch.no_grad():
            state = torch.ops.fastkd.chunked_forward(*arguments)[1]
        backward = torch.ones(N), state, *arguments
        torch.library.opcheck(torch.ops.fastkd.chunked_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_derivative(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the operators themselves: it would be dropped from a gradient penalty silently."""
    monkeypatch.setattr(Logits, "lie_in_memory", lambda self: False)
    x = X.clone().requires_grad_()
    loss = kd_loss(Head(x, W), Head(TX, TW), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
