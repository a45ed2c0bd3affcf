"""How the logit losses behave in the autograd graph: what they save, change, refuse and repeat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from logit_problems import DIVERGENCES, STORAGE
from torch import Tensor

import fastkd
from fastkd.testing import peaked_logits

N, V = 5, 43


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    return peaked_logits(N, V, seed=1), peaked_logits(N, V, seed=2), torch.arange(N)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_retained_graph_twice_with_different_grad_output(
    impl: str, divergence: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, target = problem
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, target, divergence=divergence, reduction="none", impl=impl)
    first, second = torch.linspace(1, 2, N), torch.linspace(-3, 0.5, N)
    (a,) = torch.autograd.grad(loss, leaf, first, retain_graph=True)
    (b,) = torch.autograd.grad(loss, leaf, second, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, first)
    torch.testing.assert_close(b, a * (second / first).unsqueeze(1), rtol=1e-5, atol=1e-7)
    assert torch.equal(again, a)
    assert float(a.abs().max()) > 1e-3


def test_expanded_grad_output(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """loss.sum() hands down a tensor of stride 0."""
    student, teacher, target = problem
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, target, reduction="none", impl=impl)
    (a,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    (b,) = torch.autograd.grad(loss, leaf, torch.ones(N))
    assert torch.equal(a, b)


def test_strided_grad_output(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, reduction="none", impl=impl)
    upstream = torch.linspace(1, 2, 2 * N)
    (a,) = torch.autograd.grad(loss, leaf, upstream[::2], retain_graph=True)
    (b,) = torch.autograd.grad(loss, leaf, upstream[::2].clone())
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_same_bits_twice(impl: str, dtype: torch.dtype) -> None:
    n = 5 if impl == "triton" and not torch.cuda.is_available() else 70  # interpreted, a row takes its time
    student, teacher = peaked_logits(n, 301, dtype=dtype), peaked_logits(n, 301, seed=1, dtype=dtype)

    def run() -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, torch.arange(n), divergence="jsd", impl=impl)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    (loss, grad), (loss_again, grad_again) = run(), run()
    assert torch.equal(loss, loss_again)
    assert torch.equal(grad, grad_again)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inputs_are_not_changed(impl: str, divergence: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    weight, temperature = torch.rand(N), torch.rand(N) + 0.5
    inputs = (student, teacher, target, weight, temperature)
    before = [x.clone() for x in inputs]
    leaf = student.requires_grad_()
    versions = [x._version for x in inputs]
    fastkd.kd_loss(
        leaf, teacher, target, divergence=divergence, row_weight=weight, temperature=temperature, impl=impl
    ).backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


def test_the_teacher_gets_no_gradient(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    teacher.requires_grad_()
    loss = fastkd.kd_loss(student.requires_grad_(), [teacher, teacher * 2], impl=impl)
    loss.backward()
    assert teacher.grad is None
    assert not fastkd.kd_loss(student.detach(), teacher, impl=impl).requires_grad


def test_no_graph_without_a_student_that_wants_one(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    with torch.no_grad():
        assert not fastkd.kd_loss(student.requires_grad_(), teacher, impl=impl).requires_grad
    with torch.inference_mode():
        assert fastkd.kd_loss(student.detach().clone(), teacher.clone(), impl=impl).isfinite()


def test_what_was_made_under_inference_mode(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """A teacher's forward runs there, in many loops; autograd refuses to save its logits, eager losses take them."""
    student, teacher, target = problem
    weight = torch.linspace(0.5, 1, N)
    want = fastkd.kd_loss(student.requires_grad_(), [teacher, teacher * 2], target, row_weight=weight, impl=impl)
    want_grad = torch.autograd.grad(want, student)[0]
    with torch.inference_mode():
        inferred = [x.clone() for x in (teacher, target, weight)]
    teachers = [inferred[0], teacher * 2]
    loss = fastkd.kd_loss(student, teachers, inferred[1], row_weight=inferred[2], impl=impl)
    assert torch.equal(loss, want)
    assert torch.equal(torch.autograd.grad(loss, student, retain_graph=True)[0], want_grad)
    teachers[1].zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


@pytest.mark.parametrize("changed", ["student", "teacher", "target", "row_weight", "temperature", "teacher_weight"])
def test_changed_in_place_before_backward(impl: str, changed: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Buffers are reused for the next batch: a gradient of half the old and half the new one is never made."""
    student, teacher, target = problem
    logits = student.requires_grad_() * 1
    tensors = {"student": logits, "teacher": teacher, "target": target}
    options = {"row_weight": torch.ones(N), "temperature": torch.ones(N), "teacher_weight": torch.ones(N, 1)}
    loss = fastkd.kd_loss(**tensors, **options, impl=impl)  # type: ignore[call-overload]
    (tensors | options)[changed].detach().fill_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        loss.backward()


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_overwrite_student(impl: str, divergence: str, dtype: torch.dtype) -> None:
    """The gradient of the logits lies in the memory of the logits, with the bits of a separate one."""
    leaf = peaked_logits(N, 2100 if impl != "triton" else 90, dtype=dtype).requires_grad_()
    teacher, target = torch.randn_like(leaf.detach()), torch.arange(N)

    def backward(overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        student = leaf * 1
        seen: list[Tensor] = []
        student.register_hook(seen.append)
        options = {"divergence": divergence, "temperature": 2.0, "label_smoothing": 0.1}
        loss = fastkd.kd_loss(student, teacher, target, overwrite_student=overwrite, impl=impl, **options)  # type: ignore[call-overload]
        loss.backward()
        return loss.detach(), student, seen[0]

    loss, student, grad = backward(True)
    want_loss, _, want = backward(False)
    assert torch.equal(loss, want_loss)
    assert grad.data_ptr() == student.data_ptr()
    assert not grad.requires_grad
    assert torch.equal(grad, want)


def test_overwritten_logits_cannot_be_used_again(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    logits = student.requires_grad_() * 1
    other = logits.square().sum()
    loss = fastkd.kd_loss(logits, teacher, overwrite_student=True, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_overwriting_with_leading_dimensions_and_maps(impl: str) -> None:
    for shape, dim, layout in (((2, 3, V), -1, torch.contiguous_format), ((2, V, 3, 4), 1, torch.channels_last)):
        leaf = torch.randn(shape).to(memory_format=layout).requires_grad_()
        teacher = torch.randn(shape)
        logits = leaf * 1
        fastkd.kd_loss(logits, teacher, dim=dim, overwrite_student=True, impl=impl).backward()
        got, leaf.grad = leaf.grad, None
        fastkd.kd_loss(leaf, teacher, dim=dim, impl=impl).backward()
        assert torch.equal(got, leaf.grad)  # type: ignore[arg-type]


def test_evaluation_does_not_overwrite(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    before = student.clone()
    fastkd.kd_loss(student, teacher, overwrite_student=True, impl=impl)
    assert torch.equal(student, before)


def test_overwrite_is_refused_where_it_would_destroy(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    leaf = student.requires_grad_()
    for parameter in (leaf, leaf.view_as(leaf), leaf[:], leaf.unsqueeze(0)[0]):
        with pytest.raises(ValueError, match="overwrite_student must be False for a leaf or a view of one"):
            fastkd.kd_loss(parameter, teacher, overwrite_student=True, impl=impl)
    with pytest.raises(ValueError, match="overwrite_student must be False unless the student is contiguous"):
        fastkd.kd_loss((leaf * 1)[:, 1:], teacher[:, 1:], overwrite_student=True, impl=impl)
    logits = leaf * 1
    for options in ({"teacher": logits.detach()}, {"teacher": teacher, "row_weight": logits.detach()[0, :N]}):
        with pytest.raises(ValueError, match="overwrite_student must be False where another argument shares"):
            fastkd.kd_loss(logits, **options, overwrite_student=True, impl=impl)  # type: ignore[arg-type]


def test_overwriting_no_rows(impl: str) -> None:
    """All empty memories have the address 0: they are not the same."""
    leaf = torch.empty(0, V, requires_grad=True)
    fastkd.kd_loss(leaf * 1, torch.empty(0, V), overwrite_student=True, impl=impl).backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, V)


@pytest.mark.parametrize("reentrant", [False, True])
def test_overwriting_under_checkpoint(impl: str, reentrant: bool, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """tanh saves its output, which are the logits; where hooks hand it back, autograd compares no versions."""
    from torch.utils.checkpoint import checkpoint

    student, teacher, target = problem
    leaf = student.requires_grad_()

    def loss(x: Tensor, overwrite: bool = True) -> Tensor:
        return fastkd.kd_loss(torch.tanh(x), teacher, target, overwrite_student=overwrite, impl=impl)

    if reentrant:  # without hooks: the version error comes
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            checkpoint(loss, leaf, use_reentrant=True).backward()
        return
    checkpoint(loss, leaf, use_reentrant=False).backward()
    (want,) = torch.autograd.grad(loss(leaf, overwrite=False), leaf)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, want)


def test_second_derivatives_raise(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, impl=impl)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="its losses have no second derivative"):
        (grad.square().sum() + leaf.sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its losses have no second derivative"):
        torch.autograd.grad(loss + grad.square().sum(), leaf)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"
)  # torch's own, at the first forward-mode call
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, s, t: torch.func.vmap(f)(s, t),
        lambda f, s, t: torch.func.jvp(lambda x: f(x, t), (s,), (torch.ones_like(s),)),
        lambda f, s, t: torch.func.jacrev(lambda x: f(x, t))(s),
    ],
    ids=["vmap", "jvp", "jacrev"],
)
def test_functional_transforms_raise(
    impl: str, transform: Callable[..., object], problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, _ = problem
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(lambda s, t: fastkd.kd_loss(s, t, impl=impl), student, teacher)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_raises(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = problem
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        forward_ad.unpack_dual(
            fastkd.kd_loss(forward_ad.make_dual(student, torch.ones_like(student)), teacher, impl=impl)
        )
