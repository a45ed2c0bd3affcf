"""Losses over heads never hold the logits of all tokens, and no more of them than the workspace says."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from head_problems import device_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import Head

N, H, V = 10, 4, 210
ROW = V * 4
WORKSPACE = 4 * ROW
LOGITS = N * ROW
SMALL = 40 * N * 8  # numbers a row, and rows of hidden states


class Allocations(TorchDispatchMode):
    """The largest tensor that an operator made, and the most bytes of such tensors at a time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.users = {x.untyped_storage().data_ptr(): 1 for x in known}
        self.largest = self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._seen(tensor)
        return result

    def _seen(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if self.users.get(pointer, 0) == 0:
            self.live += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, self.live)
        self.users[pointer] = self.users.get(pointer, 0) + 1
        weakref.finalize(tensor, self._gone, pointer, size)

    def _gone(self, pointer: int, size: int) -> None:
        self.users[pointer] -= 1
        if self.users[pointer] == 0:
            self.live -= size


def given(impl: str, side: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[Tensor]]:
    """A head or logits, and the leaves that it is made of."""
    device = device_of(impl)
    if side == "logits":
        leaf = torch.randn(N, V, dtype=dtype, device=device).requires_grad_()
        return leaf, [leaf]
    leaves = [torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for shape in ((N, H), (V, H), (V,))]
    return Head(*leaves, workspace=WORKSPACE, **options), leaves


SIDES = [("head", "head"), ("head", "logits"), ("logits", "head")]


def rows_of(impl: str) -> Tensor:
    return torch.arange(N, device=device_of(impl)).where(torch.arange(N, device=device_of(impl)) % 5 != 3, -100)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_the_logits_of_all_tokens_never_exist(
    impl: str, sides: tuple[str, str], compact: bool, reduction: str, softcap: float | None
) -> None:
    """In forward, in backward, and in a second backward that computes all again."""
    if impl == "triton" and not torch.cuda.is_available() and (reduction != "mean" or compact or softcap is None):
        pytest.skip("interpreted: one of each side")
    student, leaves = given(impl, sides[0], **{"softcap": softcap, "compact": compact} if sides[0] == "head" else {})
    teacher, others = given(impl, sides[1], **{"compact": compact} if sides[1] == "head" else {})
    target = rows_of(impl)
    # The gradient of given logits is theirs to have. Beside it: gradients of parameters, and a few numbers a row.
    gradients = sum(x.numel() * 4 for x in leaves)
    with Allocations(*leaves, *others, target) as forward:
        loss = fastkd.kd_loss(student, teacher, target, reduction=reduction, impl=impl)
    for _ in range(2):
        with Allocations(*leaves, *others, target, loss) as backward:
            grads = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
        for seen in (forward, backward):
            assert seen.largest <= max(WORKSPACE, LOGITS if sides[0] == "logits" else SMALL)
            if impl != "reference":  # eager code has many of what a chunk has
                assert seen.peak <= gradients + WORKSPACE + SMALL
        assert all(x.shape == y.shape for x, y in zip(grads, leaves, strict=True))
        del grads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_operands_are_not_copied_whole(impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.losses import _sources

    monkeypatch.setattr(_sources, "SLAB", 16 * H * 4)
    student, leaves = given(impl, "head", dtype)
    teacher, others = given(impl, "head", dtype)
    with Allocations(*leaves, *others) as seen, torch.no_grad():
        fastkd.kd_loss(student, teacher, impl=impl)
    assert seen.largest <= WORKSPACE
    if impl != "reference":
        assert seen.peak <= WORKSPACE + SMALL


@pytest.mark.parametrize("workspace", [1, 2 * ROW, 2 * ROW + 1, 7 * ROW, 10 * LOGITS])
def test_chunks_fit_the_workspace(impl: str, workspace: int) -> None:
    """One row is always computed."""
    student, leaves = given(impl, "head")
    teacher, others = given(impl, "head")
    if impl == "triton" and not torch.cuda.is_available() and workspace != 7 * ROW:
        pytest.skip("interpreted: few chunks")
    heads = [Head(*x.tensors(), workspace=workspace) for x in (student, teacher)]
    with Allocations(*leaves, *others) as seen, torch.no_grad():
        fastkd.kd_loss(*heads, impl=impl)
    assert seen.largest <= max(workspace // 2, ROW, SMALL)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nothing_of_the_size_of_the_logits_is_kept(impl: str, reduction: str) -> None:
    """Between forward and backward: what the caller passed, the gradients of a reduced loss, a few numbers a row."""
    student, leaves = given(impl, "head")
    teacher, others = given(impl, "head")
    saved: list[Tensor] = []
    seen = Allocations(*leaves, *others)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), seen:  # type: ignore[func-returns-value]
        loss = fastkd.kd_loss(student, teacher, reduction=reduction, impl=impl)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (*leaves, *others)}
    gc.collect()
    gradients = sum(x.numel() * 4 for x in leaves) if reduction == "mean" else 0
    assert seen.live <= gradients + SMALL
    assert loss.requires_grad


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_all_is_freed_with_the_graph(impl: str, reduction: str) -> None:
    leaf = torch.randn(N, H, device=device_of(impl)).requires_grad_()
    hidden, taught = leaf * 1, torch.randn(N, H, device=device_of(impl))
    weight = torch.randn(V, H, device=device_of(impl))
    alive = weakref.ref(hidden), weakref.ref(taught)
    loss = fastkd.kd_loss(Head(hidden, weight), Head(taught, weight), reduction=reduction, impl=impl)
    loss.sum().backward()
    del hidden, taught
    assert [x() for x in alive] == [None, None]
    loss = fastkd.kd_loss(Head(leaf * 1, weight), Head(leaf.detach(), weight), reduction=reduction, impl=impl)
    graph = weakref.ref(loss.grad_fn)
    del loss  # never went backward
    assert graph() is None
