"""How losses over heads behave in the autograd graph: who gets a gradient, what it costs, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_problems import device_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd
from fastkd import Head

pytestmark = pytest.mark.few_interpreted(3)  # a graph is the same whoever computes; kernels have tests of their own
N, H, V = 5, 6, 37
Tensors = tuple[Tensor, ...]


@pytest.fixture
def tensors(impl: str) -> Tensors:
    """Input, weight and bias of the student, then the teacher's input and weight."""
    made = torch.randn(N, H), torch.randn(V, H), torch.randn(V), torch.randn(N, 3), torch.randn(V, 3)
    return tuple(x.to(device_of(impl)) for x in made)


def labels(impl: str) -> Tensor:
    return torch.tensor([3, -100, 0, 36, 7], device=device_of(impl))


def heads(tensors: Tensors, **options: Any) -> tuple[Head, Head]:
    options.setdefault("workspace", 2 * 2 * V * 4)  # two rows of both
    return Head(*tensors[:3], scale=0.5, **options), Head(*tensors[3:], softcap=5.0, **options)


def logits(tensors: Tensors) -> tuple[Tensor, Tensor]:
    student = 0.5 * F.linear(*tensors[:3])
    return student, 5 * torch.tanh(F.linear(*tensors[3:]) / 5)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


PARTS = [part for k in range(4) for part in itertools.combinations(("input", "weight", "bias"), k)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trained", PARTS, ids="+".join)
def test_frozen_parts_get_no_gradient(impl: str, trained: tuple[str, ...], reduction: str, tensors: Tensors) -> None:
    for name, tensor in zip(("input", "weight", "bias"), tensors[:3], strict=True):
        tensor.requires_grad_(name in trained)
    wanted = [x for x in tensors[:3] if x.requires_grad]
    student, teacher = heads(tensors)
    loss = fastkd.kd_loss(student, teacher, labels(impl), reduction=reduction, impl=impl)
    want = fastkd.kd_loss(*logits(tensors), labels(impl), reduction=reduction, impl=impl)
    close(loss.detach(), want.detach())
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.sum().backward()
        for x, grad in zip(wanted, torch.autograd.grad(want.sum(), wanted), strict=True):
            assert x.grad is not None
            close(x.grad, grad)
    assert [x.grad is None for x in tensors[:3]] == [name not in trained for name in ("input", "weight", "bias")]


def flops(impl: str, call: Callable[[], Tensor]) -> int:
    """Of matmuls, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loss = call()
        if loss.requires_grad:
            loss.sum().backward()
    return counter.get_total_flops()


MATMUL = 2 * N * V  # of hidden size 1


@pytest.mark.parametrize(
    ("trained", "matmuls"),
    [((), 1), (("bias",), 1), (("input",), 2), (("weight",), 2), (("input", "weight"), 3)],
    ids=str,
)
def test_a_frozen_part_costs_no_matmul(impl: str, trained: tuple[str, ...], matmuls: int, tensors: Tensors) -> None:
    """Logits of both, and what each gradient that is asked for needs: nothing is computed twice."""
    for name, tensor in zip(("input", "weight", "bias"), tensors[:3], strict=True):
        tensor.requires_grad_(name in trained)
    student, teacher = heads(tensors)
    assert flops(impl, lambda: fastkd.kd_loss(student, teacher, impl=impl)) == MATMUL * (matmuls * H + 3)


def test_a_trained_teacher_costs_no_matmul_and_gets_no_gradient(impl: str, tensors: Tensors) -> None:
    for x in tensors:
        x.requires_grad_()
    student, teacher = heads(tensors)
    assert flops(impl, lambda: fastkd.kd_loss(student, teacher, impl=impl)) == MATMUL * (3 * H + 3)
    assert [x.grad is None for x in tensors] == [False, False, False, True, True]
    with torch.no_grad():
        assert not fastkd.kd_loss(student, teacher, impl=impl).requires_grad


@pytest.mark.parametrize("why", ["target", "row_weight"])
@pytest.mark.parametrize("compact", [None, True, False])
def test_rows_that_do_not_count_cost_no_matmul(impl: str, why: str, compact: bool | None, tensors: Tensors) -> None:
    target, weight = labels(impl), torch.ones(N, device=device_of(impl))
    if why == "target":
        target[:2] = -100
    else:
        target[1], weight[:2] = 0, 0
    for x in tensors[:3]:
        x.requires_grad_()
    student, teacher = heads(tensors, compact=compact)
    computed = 3 if (compact is None and device_of(impl) == "cpu") or compact else N
    got = flops(impl, lambda: fastkd.kd_loss(student, teacher, target, row_weight=weight, impl=impl))
    assert got == 2 * computed * V * (3 * H + 3)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_retained_graph_with_different_upstream_gradients(impl: str, reduction: str, tensors: Tensors) -> None:
    """What forward kept is used up by the first; the others compute it again."""
    leaves = [x.requires_grad_() for x in tensors[:3]]
    loss = fastkd.kd_loss(*heads(tensors), labels(impl), reduction=reduction, impl=impl)
    want = fastkd.kd_loss(*logits(tensors), labels(impl), reduction=reduction, impl=impl)
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(loss.shape, generator=generator).to(loss.device)
        got = torch.autograd.grad(loss, leaves, upstream, retain_graph=seed < 3)
        close(got, torch.autograd.grad(want, leaves, upstream, retain_graph=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_handed_out_are_the_callers(impl: str, reduction: str, tensors: Tensors) -> None:
    """Whoever changes one changes no later one."""
    leaves = [x.requires_grad_() for x in tensors[:3]]
    loss = fastkd.kd_loss(*heads(tensors), reduction=reduction, impl=impl).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.zero_()
    close(torch.autograd.grad(loss, leaves, retain_graph=True), tuple(copies))
    loss.backward(retain_graph=True)
    loss.backward()
    close([x.grad for x in leaves], [2 * x for x in copies])


def test_expanded_and_strided_upstream_gradients(impl: str, tensors: Tensors) -> None:
    leaves = [x.requires_grad_() for x in tensors[:3]]
    loss = fastkd.kd_loss(*heads(tensors), reduction="none", impl=impl)
    upstream = torch.linspace(1, 2, 2 * N, device=loss.device)
    a = torch.autograd.grad(loss, leaves, upstream[::2], retain_graph=True)
    b = torch.autograd.grad(loss, leaves, upstream[::2].clone(), retain_graph=True)
    c = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    d = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    for x, y in zip((*a, *c), (*b, *d), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("changed", ["input", "weight", "bias", "taught", "matrix", "target", "row_weight", "alpha"])
def test_changed_in_place(impl: str, changed: str, reduction: str, tensors: Tensors) -> None:
    """Gradients that forward made stay right; what is computed from the new values is refused."""
    names = ("input", "weight", "bias", "taught", "matrix")
    rows = {"row_weight": torch.ones(N), "alpha": torch.full((N,), 0.5)}
    rows = {name: value.to(tensors[0].device) for name, value in rows.items()}
    target, leaves = labels(impl), [x.requires_grad_() for x in tensors[:3]]

    def loss_of(given: Tensors) -> Tensor:
        return fastkd.kd_loss(*heads(given), target, reduction=reduction, impl=impl, **rows).sum()

    want = torch.autograd.grad(loss_of(tensors), leaves)
    loss = loss_of(tensors)
    (dict(zip(names, tensors, strict=True)) | {"target": target, **rows})[changed].detach().fill_(2)
    if reduction == "mean":
        for x, y in zip(torch.autograd.grad(loss, leaves, retain_graph=True), want, strict=True):
            assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives_raise(impl: str, reduction: str, tensors: Tensors) -> None:
    leaves = [x.requires_grad_() for x in tensors[:3]]
    loss = fastkd.kd_loss(*heads(tensors), reduction=reduction, impl=impl).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="its losses have no second derivative"):
            (grad.square().sum() + leaves[0].sum()).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="its losses have no second derivative"):
            torch.autograd.grad(loss + grad.square().sum(), leaves[1], retain_graph=True)


def test_functional_transforms_raise(impl: str, tensors: Tensors) -> None:
    student, teacher = heads(tensors)

    def loss(hidden: Tensor) -> Tensor:
        return fastkd.kd_loss(Head(hidden, student.weight), teacher, impl=impl)

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(student.input)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_teachers_of_inference(impl: str, reduction: str, mode: Callable[[], Any], tensors: Tensors) -> None:
    with mode():
        taught, matrix = tensors[3] * 2, tensors[4].clone()
    leaves = [x.requires_grad_() for x in tensors[:3]]
    given = (*tensors[:3], taught, matrix)
    loss = fastkd.kd_loss(*heads(given), reduction=reduction, impl=impl).sum()
    want = fastkd.kd_loss(*logits((*tensors[:3], tensors[3] * 2, tensors[4])), reduction=reduction, impl=impl).sum()
    for again in (True, False):
        close(
            torch.autograd.grad(loss, leaves, retain_graph=again), torch.autograd.grad(want, leaves, retain_graph=True)
        )
    with mode():
        assert not fastkd.kd_loss(*heads(given), impl=impl).requires_grad


def test_tied_embeddings(impl: str) -> None:
    """One parameter embeds and projects: both gradients add up in it, as in eager code."""
    device = device_of(impl)
    embedding = nn.Embedding(V, H, device=device)
    ids, teacher = torch.tensor([1, 5, 5, 0], device=device), torch.randn(4, V, device=device)
    hidden = torch.tanh(embedding(ids))
    fastkd.kd_loss(Head(hidden, embedding.weight), teacher, ids, impl=impl).backward()
    got, embedding.weight.grad = embedding.weight.grad, None
    fastkd.kd_loss(F.linear(torch.tanh(embedding(ids)), embedding.weight), teacher, ids, impl=impl).backward()
    close(got, embedding.weight.grad)
    assert float(got.abs().max()) > 1e-3  # type: ignore[union-attr]


def test_student_and_teacher_of_the_same_tensors(impl: str, tensors: Tensors) -> None:
    """As one who regularises towards another layer does: the teacher's use counts for nothing."""
    hidden, weight = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    loss = fastkd.kd_loss(Head(hidden, weight), Head(hidden, weight, scale=2.0), impl=impl)
    student, teacher = F.linear(hidden, weight), 2 * F.linear(hidden, weight).detach()
    want = fastkd.kd_loss(student, teacher, impl=impl)
    close(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)))


def test_inputs_are_not_changed(impl: str, tensors: Tensors) -> None:
    before, target = [x.clone() for x in tensors], labels(impl)
    for x in tensors[:3]:
        x.requires_grad_()
    versions = [x._version for x in tensors]
    for reduction in ("none", "mean"):
        loss = fastkd.kd_loss(*heads(tensors), target, reduction=reduction, impl=impl).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert [x._version for x in tensors] == versions
    assert torch.equal(target, labels(impl))


def test_logits_of_the_student_beside_a_head(impl: str, tensors: Tensors) -> None:
    """They keep their own rules: any layout, a gradient of their dtype, and overwrite_student says where it may lie."""
    student = torch.randn(V, N, device=tensors[0].device).t().requires_grad_()
    _, teacher = heads(tensors)
    (got,) = torch.autograd.grad(fastkd.kd_loss(student, teacher, labels(impl), impl=impl), student)
    (want,) = torch.autograd.grad(fastkd.kd_loss(student, teacher.logits(), labels(impl), impl=impl), student)
    close(got, want)
    with pytest.raises(ValueError, match="overwrite_student must be False for a leaf"):
        fastkd.kd_loss(student, teacher, overwrite_student=True, impl=impl)


def test_overwrite_student_with_heads(impl: str, tensors: Tensors) -> None:
    """Logits of a head never were the caller's; those beside a teacher's head may be overwritten or not."""
    leaves = [x.requires_grad_() for x in tensors[:3]]
    student, teacher = heads(tensors)
    got = torch.autograd.grad(fastkd.kd_loss(student, teacher, overwrite_student=True, impl=impl), leaves)
    want = torch.autograd.grad(fastkd.kd_loss(student, teacher, impl=impl), leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    base = torch.randn(N, V, device=tensors[0].device, requires_grad=True)
    results = []
    for overwrite in (True, False):
        loss = fastkd.kd_loss(base * 2, teacher, overwrite_student=overwrite, impl=impl)
        results += torch.autograd.grad(loss, base)
    assert torch.equal(*results)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_same_bits_twice(impl: str, reduction: str, tensors: Tensors) -> None:
    leaves = [x.requires_grad_() for x in tensors[:3]]
    runs = []
    for _ in range(2):
        loss = fastkd.kd_loss(*heads(tensors), labels(impl), reduction=reduction, impl=impl)
        runs.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


class Matmuls(TorchDispatchMode):
    """The rows of every product over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            first, second = args[-2:]
            if second.shape[1] == V:
                self.rows.append(first.shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "chunks"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (3, [3, 2]), (4, [3, 2]), (9, [5])])
def test_chunks_are_as_few_as_the_workspace_allows_and_even(
    impl: str, rows: int, chunks: list[int], tensors: Tensors
) -> None:
    with Matmuls() as seen, torch.no_grad():
        fastkd.kd_loss(*heads(tensors, workspace=rows * 2 * V * 4), impl=impl)
    assert seen.rows == [n for n in chunks for _ in range(2)]


def test_set_workspace(impl: str, tensors: Tensors) -> None:
    """For all calls; a head's own goes first; None restores the default."""
    head = Head(*tensors[:2])
    try:
        fastkd.set_workspace(2 * V * 4)
        with Matmuls() as seen:
            fastkd.cross_entropy(head, labels(impl).relu(), impl=impl)
        assert seen.rows == [2, 2, 1]
        with Matmuls() as seen:
            fastkd.cross_entropy(Head(*tensors[:2], workspace=3 * V * 4), labels(impl).relu(), impl=impl)
        assert seen.rows == [3, 2]
    finally:
        fastkd.set_workspace(None)
    with Matmuls() as seen:
        fastkd.cross_entropy(head, labels(impl).relu(), impl=impl)
    assert seen.rows == [5]
