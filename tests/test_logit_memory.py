"""What the logit losses keep and allocate, and what they do with tensors that have no memory to point at."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fastkd
from fastkd.testing import peaked_logits

N, V = 4, 130
FACTORIES = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones_like", "full_like", "cat", "stack")
COPIES = ("new_empty", "new_zeros", "new_full", "new_ones", "clone", "contiguous", "to", "float", "double", "reshape")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    tensors = peaked_logits(N, V), peaked_logits(N, V, seed=1), torch.arange(N)
    return tensors[0].to(DEVICE), tensors[1].to(DEVICE), tensors[2].to(DEVICE)


def tensors_held_by(node: Any) -> Iterator[Tensor]:
    """Everything that the Python side of a graph node refers to."""
    seen, pending = set(), [vars(node)]
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, type) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif type(thing).__module__.startswith("fastkd") or isinstance(thing, (dict, list, tuple)):
            pending += gc.get_referents(thing)


def test_nothing_of_the_size_of_the_logits_is_kept(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Between forward and backward: what the caller passed, saved by autograd, and a few numbers a row."""
    student, teacher, target = problem
    saved: list[Tensor] = []
    leaf = student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        loss = fastkd.kd_loss(leaf, teacher, target, divergence="jsd", impl=impl)
    assert {x.data_ptr() for x in saved} == {leaf.data_ptr(), teacher.data_ptr()}
    held = list(tensors_held_by(loss.grad_fn))
    assert any(x is not target and x.dtype is torch.float64 for x in held)  # the state: the walk found its way
    assert sum(x.numel() for x in held) <= N * 20


def test_logits_are_freed_with_the_graph(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    logits, teacher = student.requires_grad_() * 1, teacher.clone()
    alive = weakref.ref(logits), weakref.ref(teacher)
    loss = fastkd.kd_loss(logits, teacher, target, impl=impl)
    loss.backward()
    del logits, teacher
    assert [x() for x in alive] == [None, None]


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_the_gradient_is_allocated(
    impl: str, overwrite: bool, problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward nothing of the size of the logits, in backward the gradient and nothing else."""
    if impl == "reference":
        pytest.skip("eager")
    sizes: list[int] = []

    def counted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            result = allocate(*args, **kwargs)
            sizes.append(result.numel())
            return result

        return call

    for owner, names in ((torch, FACTORIES), (Tensor, COPIES)):
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    student, teacher, target = problem
    logits = torch.relu(student.requires_grad_())
    loss = fastkd.kd_loss(logits, teacher, target, overwrite_student=overwrite, impl=impl)
    assert 0 < max(sizes) <= N * 20
    sizes.clear()
    (grad,) = torch.autograd.grad(loss, logits)
    assert [n for n in sizes if n > N * 20] == ([] if overwrite else [N * V])
    assert (grad.data_ptr() == logits.data_ptr()) == overwrite


@pytest.mark.native
@pytest.mark.parametrize("name", ["student", "teacher", "target", "row_weight", "temperature"])
def test_a_tensor_whose_memory_was_freed(name: str) -> None:
    """As fully sharded modules free theirs: an address of 0 is neither read nor taken for an absent argument."""
    tensors = {"student": torch.randn(N, V), "teacher": torch.randn(N, V), "target": torch.arange(N)}
    tensors |= {"row_weight": torch.ones(N), "temperature": torch.ones(N)}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \(4.*\) must have memory, got none"):
        fastkd.kd_loss(**tensors, impl="native")  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["student", "teacher", "target", "row_weight"])
def test_a_tensor_of_another_type(impl: str, name: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """A wrapper has no memory: it is dispatched on, wherever it stands among the arguments."""
    tensors = dict(zip(("student", "teacher", "target"), problem, strict=True))
    tensors["row_weight"] = torch.linspace(0.5, 1, N, device=DEVICE)
    want = fastkd.kd_loss(**tensors, impl=impl)  # type: ignore[call-overload]
    tensors[name] = TwoTensor(tensors[name], tensors[name].clone())
    got = fastkd.kd_loss(**tensors, impl=impl)  # type: ignore[call-overload]
    assert isinstance(got, TwoTensor)
    assert torch.equal(got.a, want)
    assert torch.equal(got.b, want)


@pytest.mark.parametrize("real", [False, True])
def test_fake_tensors(impl: str, real: bool, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Under a mode that fakes, real arguments too are looked at for their shape alone."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        student, teacher, target = problem if real else [mode.from_tensor(x) for x in problem]
        loss = fastkd.kd_loss(student, teacher, target, reduction="none", impl=impl)
    assert isinstance(loss, FakeTensor)
    assert loss.shape == (N,)


def test_a_traced_graph_has_the_operator(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    graph = make_fx(lambda s, t: fastkd.kd_loss(s, t, target))(student, teacher)
    assert "fastkd.logit_forward" in graph.code
    assert torch.equal(graph(student * 2, teacher), fastkd.kd_loss(student * 2, teacher, target))


def test_a_lazy_minus_sign(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the other sign."""
    student, teacher, target = problem

    def negated(x: Tensor) -> Tensor:
        view = torch._neg_view(-x)
        assert view.is_neg()
        return view

    def answer(wrap: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        weight = torch.linspace(0.5, 1, N, device=DEVICE)
        loss = fastkd.kd_loss(wrap(leaf), wrap(teacher), target, row_weight=wrap(weight), reduction="none", impl=impl)
        (grad,) = torch.autograd.grad(loss, leaf, wrap(weight))
        return loss.detach(), grad

    for got, want in zip(answer(negated), answer(lambda x: x), strict=True):
        assert torch.equal(got, want)
