"""Teachers without logits in the autograd graph: what is saved, changed, refused, repeated and allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_problems import TAKES, labels
from sparse_problems import known as made
from torch import Tensor

import fastkd
from fastkd import Expected, Head, TopK
from fastkd.testing import flat_logits

pytestmark = pytest.mark.few_interpreted(41)  # its kernels have tests of their own
N, V, K, H = 4, 53, 9, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTORIES = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones_like", "full_like", "cat", "stack",
             "where", "gather", "index_select", "scatter", "take_along_dim", "log_softmax", "softmax")  # fmt: skip
COPIES = ("new_empty", "new_zeros", "new_full", "new_ones", "clone", "contiguous", "to", "float", "double", "reshape",
          "gather", "index_select", "scatter", "masked_fill", "exp", "log", "mul", "log_softmax", "softmax",
          "__getitem__", "__sub__", "__truediv__", "topk", "sort")  # fmt: skip


def known(tail: str, n: int = N, v: int = V, **kwargs: Any) -> TopK:
    teacher = made(tail, n, v, K, **kwargs)
    return TopK(*(x.to(DEVICE) for x in teacher.tensors()), **teacher.options())


def frozen() -> tuple[Tensor, Tensor]:
    return flat_logits(V, H, seed=3).to(DEVICE), flat_logits(1, V, seed=4)[0].to(DEVICE)


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Teachers with the tensors that they consist of, and options."""
    several = [known("bucket"), flat_logits(N, V, seed=5).to(DEVICE), known("uniform")]
    permuted = {"vocab_map": (torch.arange(V) * 7 % V).to(DEVICE)}
    expected = Expected.from_teacher(flat_logits(N, V, seed=6).to(DEVICE), *frozen())
    return {
        **{tail: (known(tail), {}) for tail in TAKES},
        "several": (several, {}),
        "mapped": ([flat_logits(N, V, seed=5).to(DEVICE), known("bucket")], permuted),
        "student_topk": (several[1], {"student_topk": 5, "divergence": "reverse_kl"}),
        "expected": ([expected, known("bucket")], {}),
    }


KINDS = (*TAKES, "several", "mapped", "student_topk", "expected")
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def parts_of(given: Any) -> list[Tensor]:
    several = given if isinstance(given, list) else [given]
    return [x for one in several for x in ([one] if isinstance(one, Tensor) else one.tensors())]


def problem(kind: str) -> tuple[Callable[..., Tensor], Tensor, Any, dict[str, Any]]:
    """The call, its leaf, the teachers and what else it takes."""
    teacher, options = cases()[kind]
    leaf = flat_logits(N, H if kind == "expected" else V, seed=1).to(DEVICE).requires_grad_()
    target = labels(N, V).to(DEVICE)

    def call(impl: str, reduction: str = "none") -> Tensor:
        student = Head(leaf, *frozen()) if kind == "expected" else leaf
        return fastkd.kd_loss(student, teacher, target, reduction=reduction, impl=impl, **options)

    return call, leaf, teacher, options


@BY_KIND
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_retained_graph_twice_with_different_upstream(impl: str, kind: str, reduction: str) -> None:
    call, leaf, _, _ = problem(kind)
    loss = call(impl, reduction)
    reduced = reduction == "mean"
    first = torch.tensor(1.5).to(loss) if reduced else torch.linspace(1, 2, N).to(loss)
    second = torch.tensor(-0.5).to(loss) if reduced else torch.linspace(-3, 0.5, N).to(loss)
    (a,) = torch.autograd.grad(loss, leaf, first, retain_graph=True)
    kept = a.clone()
    (b,) = torch.autograd.grad(loss, leaf, second, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, first)
    torch.testing.assert_close(b, a * (second / first).view(-1, 1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, a, rtol=0 if not reduced else 1e-5, atol=0 if not reduced else 1e-7)
    assert torch.equal(a, kept)
    assert float(a.abs().max()) > 1e-3


@BY_KIND
def test_inputs_are_not_changed_and_bits_are_the_same_twice(impl: str, kind: str) -> None:
    call, leaf, teacher, options = problem(kind)
    inputs = [leaf, *parts_of(teacher), *(x for x in options.values() if isinstance(x, Tensor))]
    before, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    for reduction in ("none", "mean"):
        runs = []
        for _ in range(2):
            loss = call(impl, reduction)
            runs.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


@BY_KIND
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_changed_in_place_before_backward(impl: str, kind: str, reduction: str) -> None:
    """An error, or the gradient of what was there: never one of half the old and half the new."""
    call, leaf, teacher, options = problem(kind)
    (want,) = torch.autograd.grad(call(impl, reduction).sum(), leaf)
    inputs = [*parts_of(teacher), *(x for x in options.values() if isinstance(x, Tensor)), leaf]
    raised = 0
    for tensor in inputs:
        before = tensor.detach().clone()
        loss = call(impl, reduction)
        tensor.detach().copy_(before.flip(0))
        try:
            (got,) = torch.autograd.grad(loss.sum(), leaf)
        except RuntimeError as error:
            assert "modified" in str(error)  # noqa: PT017
            raised += 1
        else:
            assert torch.equal(got, want)
        tensor.detach().copy_(before)
    assert raised or reduction == "mean"


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "support", "samples", "uniform"])
def test_changed_indices_are_noticed(impl: str, tail: str) -> None:
    teacher = known(tail)
    leaf = flat_logits(N, V).to(DEVICE).requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, reduction="none", impl=impl)
    teacher.indices.add_(1)
    with pytest.raises(RuntimeError, match=r"modified (in place before|by an inplace operation)"):
        loss.sum().backward()


def test_a_changed_mean_is_noticed(impl: str) -> None:
    call, _, teacher, _ = problem("expected")
    loss = call(impl)
    teacher[0].mean.add_(1)
    with pytest.raises(RuntimeError, match="modified in place before"):
        loss.sum().backward()


@BY_KIND
def test_what_was_made_under_inference_mode(impl: str, kind: str) -> None:
    """A cache is read there, in many loops."""
    call, leaf, _, _ = problem(kind)
    (want,) = torch.autograd.grad(call(impl).sum(), leaf)
    teacher, options = cases()[kind]
    with torch.inference_mode():
        several = teacher if isinstance(teacher, list) else [teacher]
        copies: list[Any] = []
        for one in several:
            if isinstance(one, Expected):
                copies.append(Expected(one.mean.clone(), bias=one.bias.clone(), entropy=one.entropy.clone()))  # type: ignore[union-attr]
            elif isinstance(one, TopK):
                copies.append(TopK(one.indices.clone(), one.log_probs.clone(), **one.options()))
            else:
                copies.append(one.clone())
        options = {name: x.clone() if isinstance(x, Tensor) else x for name, x in options.items()}
    student = Head(leaf, *frozen()) if kind == "expected" else leaf
    target = labels(N, V).to(DEVICE)
    loss = fastkd.kd_loss(student, copies, target, reduction="none", impl=impl, **options)
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@BY_KIND
def test_the_teacher_gets_no_gradient_and_none_is_made_for_nobody(impl: str, kind: str) -> None:
    call, leaf, teacher, _ = problem(kind)
    floating = [x for x in parts_of(teacher) if x.is_floating_point()]
    for x in floating:
        x.requires_grad_()
    call(impl, "mean").backward()
    assert all(x.grad is None for x in floating)
    leaf.requires_grad_(False)
    assert not call(impl, "mean").requires_grad
    with torch.inference_mode():
        assert bool(call(impl).isfinite().all())


@BY_KIND
def test_second_derivatives_raise(impl: str, kind: str) -> None:
    call, leaf, _, _ = problem(kind)
    (grad,) = torch.autograd.grad(call(impl, "mean"), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="its losses have no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [*((tail, divergence) for tail, takes in TAKES.items() for divergence in takes if divergence != "tvd")],
)
def test_gradcheck(tail: str, divergence: str) -> None:
    teacher = made(tail, 2, 11, 4, torch.float64)
    leaf = flat_logits(2, 11, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"temperature": torch.tensor([1.0, 2.0]), "teacher_temperature": 1.0}
    options |= {"divergence": divergence, "impl": "reference", "label_smoothing": 0.1, "alpha": 0.3}
    target = torch.tensor([3, 10])
    assert torch.autograd.gradcheck(lambda x: fastkd.kd_loss(x, teacher, target, **options), leaf)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradcheck_of_what_is_made_of_terms(reduction: str) -> None:
    x, w, b = (flat_logits(n, m, seed=n, dtype=torch.float64) for n, m in ((2, 2), (11, 2), (1, 11)))
    leaves = [y.requires_grad_() for y in (x, w, b[0].clone())]
    dense = flat_logits(2, 11, seed=9, dtype=torch.float64)
    options: dict[str, Any] = {
        "impl": "reference",
        "reduction": reduction,
        "temperature": 2.0,
        "teacher_temperature": 1.0,
    }
    sparse = [made(tail, 2, 11, 4, torch.float64) for tail in ("bucket", "support", "uniform")]
    mapping = torch.tensor([3, -1, 0, 7, 9, -1, 1, 2, 10, -1, 5])

    def loss(more: dict[str, Any], teacher: Any) -> Callable[..., Tensor]:
        wrap = {"softcap": 4.0, "scale": 0.5, "workspace": 8 * 11 * 9}
        return lambda *y: fastkd.kd_loss(Head(*y, **wrap), teacher, torch.tensor([3, 10]), **options, **more)

    assert torch.autograd.gradcheck(loss({}, [*sparse, dense]), leaves, fast_mode=True)
    assert torch.autograd.gradcheck(loss({"vocab_map": mapping}, [sparse[0], dense]), leaves, fast_mode=True)
    assert torch.autograd.gradcheck(
        loss({"divergence": "reverse_kl", "student_topk": 4}, [dense, dense * 2]), leaves, fast_mode=True
    )
    made_of = Expected.from_teacher(dense, w.detach(), b[0].detach())
    rest = {"target": torch.tensor([3, 10]), "alpha": 0.3, **options, "temperature": 1.0}
    assert torch.autograd.gradcheck(
        lambda y: fastkd.kd_loss(Head(y, w.detach(), b[0].detach(), scale=0.5), made_of, **rest),
        leaves[:1],
        fast_mode=True,
    )


class Allocations:
    """The sizes of all tensors that torch's Python functions hand back as new memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        for owner, names in ((torch, FACTORIES), (Tensor, COPIES)):
            for name in names:
                monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = allocate(*args, **kwargs)
            old = [x.data_ptr() for x in args if isinstance(x, Tensor)]
            for one in result if isinstance(result, tuple) else (result,):
                if isinstance(one, Tensor) and one.data_ptr() not in old and one._base is None:
                    self.sizes.append(one.numel())
            return result

        return call


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "support", "samples"])
def test_only_the_gradient_is_allocated(impl: str, tail: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it a few numbers for each of the k ids, forward and backward."""
    if impl == "reference":
        pytest.skip("eager")
    n, v = 3, 1200
    teacher, leaf = known(tail, n, v), flat_logits(n, v).to(DEVICE).requires_grad_()
    logits, target = torch.relu(leaf), labels(n, v).to(DEVICE)
    few = n * (4 * K + 60)
    allocations = Allocations(monkeypatch)
    loss = fastkd.kd_loss(logits, teacher, target, overwrite_student=overwrite, impl=impl)
    assert 0 < max(allocations.sizes) <= few
    allocations.sizes.clear()
    (grad,) = torch.autograd.grad(loss, logits)
    assert [size for size in allocations.sizes if size > few] == ([] if overwrite else [n * v])
    assert (grad.data_ptr() == logits.data_ptr()) == overwrite


@pytest.mark.parametrize("kind", ["bucket", "support", "uniform", "expected", "several"])
def test_a_head_allocates_a_workspace_and_its_gradients(impl: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of one row at a time, of however many: nothing of rows x vocabulary ever exists."""
    if impl == "reference":
        pytest.skip("eager")
    n, v = 16, 1200
    x, w = flat_logits(n, H).to(DEVICE), flat_logits(v, H, seed=3).to(DEVICE)
    uniform = known("uniform", n, v)
    teacher: Any = {"several": [known("bucket", n, v), uniform], "uniform": uniform}.get(kind) or (
        Expected.from_teacher(flat_logits(n, v, seed=4).to(DEVICE), w) if kind == "expected" else known(kind, n, v)
    )
    leaf = x.requires_grad_()
    fastkd.kd_loss(Head(leaf, w, workspace=1), teacher, impl=impl).backward()  # the checksum is remembered
    allocations = Allocations(monkeypatch)
    fastkd.kd_loss(Head(leaf, w, workspace=1), teacher, labels(n, v).to(DEVICE), impl=impl).backward()
    assert v <= max(allocations.sizes) <= v + 1


@pytest.mark.parametrize(("kind", "rows"), [("bucket", 12), ("uniform", 6), ("several", 3), ("mapped", 2)])
def test_the_workspace_holds_what_the_terms_add_up(
    impl: str, kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the student and of a uniform teacher, two gradients to add, the pairs' logits: that many rows fit."""
    if impl == "reference":
        pytest.skip("eager")
    n, v = 24, 1200
    leaf, w = flat_logits(n, H).to(DEVICE).requires_grad_(), flat_logits(v, H, seed=3).to(DEVICE)
    teacher = known("uniform" if kind == "uniform" else "bucket", n, v)
    given: Any = [teacher, known("uniform", n, v)] if kind == "several" else teacher
    options: dict[str, Any] = {"vocab_map": torch.arange(v).to(DEVICE)} if kind == "mapped" else {}
    allocations = Allocations(monkeypatch)
    fastkd.kd_loss(Head(leaf, w, workspace=12 * v * 4), given, impl=impl, **options).backward()
    assert rows * v <= max(allocations.sizes) <= rows * (v + 1)


def test_nothing_of_the_size_of_the_logits_is_kept(impl: str) -> None:
    """Between forward and backward: what the caller passed, and k numbers a row."""
    n, v = 3, 1200
    leaf = flat_logits(n, v).to(DEVICE).requires_grad_()
    for tail in ("bucket", "uniform"):
        teacher = known(tail, n, v)
        passed = {x.data_ptr() for x in (leaf, *teacher.tensors())}
        saved: set[int] = set()

        def pack(x: Tensor, saved: set[int] = saved) -> Tensor:
            saved.add(x.data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            fastkd.kd_loss(leaf, teacher, reduction="none", impl=impl)
        assert leaf.data_ptr() in saved
        assert saved <= passed
