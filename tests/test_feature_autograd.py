"""What every loss on features does where people use it: modes, compilers, layouts, graphs, a teacher that is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from feature_problems import call, flat
from torch import Tensor

import fastkd

Loss = Callable[..., Tensor]

ROWS: dict[str, Loss] = {
    "gram": fastkd.gram_loss,
    "cosine relation": fastkd.cosine_relation_loss,
    "similarity": fastkd.similarity_preserving_loss,
    "similarity, l1": partial(fastkd.similarity_preserving_loss, norm="l1"),
    "cka": fastkd.cka_loss,
    "mse": fastkd.hint_loss,
    "cosine": partial(fastkd.hint_loss, distance="cosine"),
    "masked": partial(fastkd.hint_loss, distance="huber", mask=torch.arange(11)[:, None] % 3 > 0),
}
MAPS: dict[str, Loss] = {
    "attention": fastkd.attention_transfer_loss,
    "attention, paper": partial(fastkd.attention_transfer_loss, convention="paper"),
    "nst": fastkd.nst_loss,
}
LOSSES = {**ROWS, **MAPS}
TRACED = ("gram", "similarity, l1", "cka", "masked", "attention", "nst")  # every kind of option; tracing takes its time


def problem(name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = flat(11, 12, seed), flat(11, 12, seed + 1)
    return (student.view(11, 3, 2, 2), teacher.view(11, 3, 2, 2)) if name in MAPS else (student, teacher)


@pytest.mark.parametrize("name", LOSSES)
def test_upstream_gradients_and_graphs(name: str) -> None:
    loss, (student, teacher) = LOSSES[name], problem(name)
    want = call(loss, student, teacher)[1]
    leaf = student.clone().requires_grad_()
    kept = teacher.clone().requires_grad_()
    value = loss(leaf, kept)
    for factor in (1.0, -2.5, 0.0):
        (grad,) = torch.autograd.grad(value, leaf, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(grad, factor * want)
    leaf.grad = None
    for _ in range(3):
        value.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * want)
    assert kept.grad is None
    torch.testing.assert_close(student, problem(name)[0], rtol=0, atol=0)
    assert torch.equal(loss(leaf, teacher).detach(), loss(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_gradient(name: str) -> None:
    loss, (student, teacher) = LOSSES[name], problem(name)
    want = loss(student, teacher)
    leaf = student.clone().requires_grad_()
    with torch.no_grad():
        value = loss(leaf, teacher)
        assert not value.requires_grad
    torch.testing.assert_close(value, want)
    with torch.inference_mode():
        torch.testing.assert_close(loss(leaf, teacher), want)
        inside = teacher.clone()
    torch.testing.assert_close(call(loss, student, inside)[1], call(loss, student, teacher)[1])


@pytest.mark.parametrize("name", LOSSES)
def test_no_second_derivative(name: str) -> None:
    loss, (student, teacher) = LOSSES[name], problem(name)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    for differentiate in (lambda x: x.backward(retain_graph=True), lambda x: torch.autograd.grad(x, leaf)):
        with pytest.raises(RuntimeError, match="second derivative"):
            differentiate(value + grad.square().sum())


def test_features_may_change_after_the_loss() -> None:
    """By an activation in place, for example: the gradient is there already."""
    leaf = flat(4, 3).requires_grad_()
    features = 2 * leaf
    loss = fastkd.hint_loss(features, torch.zeros(4, 3))
    features.relu_()
    loss /= 2
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * 2 * 2 * leaf.detach() / 12 / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_rounds_nothing(name: str) -> None:
    loss, (student, teacher) = LOSSES[name], problem(name)
    want = call(loss, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(loss, student, teacher)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", LOSSES)
def test_strides(name: str) -> None:
    loss, (student, teacher) = LOSSES[name], problem(name)
    want = call(loss, student, teacher)
    for layout in (lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x], -1)[..., 0]):
        torch.testing.assert_close(call(loss, layout(student), layout(teacher)), want)
    lazily = torch._neg_view(student), torch._neg_view(teacher)
    torch.testing.assert_close(call(loss, *lazily), call(loss, -student, -teacher))
    row = student[:1].expand(student.shape)
    torch.testing.assert_close(call(loss, row, teacher), call(loss, row.contiguous(), teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_without_numbers(name: str) -> None:
    student, teacher = (x.to("meta") for x in problem(name))
    options = {"mask": torch.ones(11, 1, dtype=torch.bool, device="meta")} if name == "masked" else {}
    value, grad = call(LOSSES[name], student, teacher, **options)
    assert value.is_meta
    assert grad.shape == student.shape


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_twice(name: str) -> None:
    loss, (student, teacher) = LOSSES[name], problem(name)
    first, second = call(loss, student, teacher), call(loss, student, teacher)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", TRACED)
def test_compile(name: str) -> None:
    torch.compiler.reset()
    loss, (student, teacher) = LOSSES[name], problem(name)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(call(compiled, student, teacher), call(loss, student, teacher))
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


@pytest.mark.parametrize("name", ["cka", "masked", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compile_with_other_dtypes_and_a_prepared_teacher(name: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    loss = LOSSES[name]
    student, teacher = (x.to(dtype) for x in problem(name))
    taught = fastkd.prepare_teacher(teacher)
    loss(student, taught)
    compiled = torch.compile(lambda s: loss(s, taught), fullgraph=True, backend="aot_eager")
    leaf = student.clone().requires_grad_()
    value = compiled(leaf)
    value.backward()
    torch.testing.assert_close((value.detach(), leaf.grad), call(loss, student, teacher))


@pytest.mark.parametrize("name", TRACED[2:])
def test_export(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return LOSSES[name](student, teacher)

    student, teacher = problem(name)
    program = torch.export.export(Module(), (student, teacher))
    assert any("feature_loss" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(student, teacher), LOSSES[name](student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_a_prepared_teacher(name: str) -> None:
    """Gives the same, also where other losses left what they kept, and says when it was changed."""
    taught = fastkd.prepare_teacher(problem(name)[1])
    for other in MAPS if name in MAPS else ROWS:
        for student in (problem(name)[0], problem(name)[0].double(), problem(name)[0][..., :1] @ torch.ones(1, 12)):
            if student.shape == taught.tensor.shape:
                for _ in range(2):
                    got = call(LOSSES[other], student, taught)
                    torch.testing.assert_close(got, call(LOSSES[other], student, taught.tensor), rtol=1e-5, atol=1e-7)
    taught.tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified in place after prepare_teacher"):
        LOSSES[name](problem(name)[0], taught)


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_that_was_prepared_in_inference_mode(name: str) -> None:
    """As teachers are mostly run; the student is not."""
    student, teacher = problem(name)
    with torch.inference_mode():
        taught = fastkd.prepare_teacher(teacher.clone())
        inside = LOSSES[name](student, taught)
    value, grad = call(LOSSES[name], student, taught)
    torch.testing.assert_close((value, grad), call(LOSSES[name], student, teacher))
    torch.testing.assert_close(inside, value)


@pytest.mark.parametrize("changes", [0, 1, 3])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda taught: pickle.loads(pickle.dumps(taught))])
def test_a_copy_of_a_prepared_teacher(copied: Callable[[Any], Any], changes: int) -> None:
    student, teacher = problem("cka")
    for _ in range(changes):
        teacher.mul_(1)
    taught = fastkd.prepare_teacher(teacher)
    want = fastkd.cka_loss(student, taught)
    again = copied(taught)
    assert list(again.kept) == list(taught.kept)
    assert torch.equal(fastkd.cka_loss(student, again), want)
    with torch.inference_mode():
        assert torch.equal(fastkd.cka_loss(student, copied(fastkd.prepare_teacher(teacher.clone()))), want)
    again.tensor.add_(1)
    for modified in (again, copied(again)):
        with pytest.raises(RuntimeError, match="modified in place after prepare_teacher"):
            fastkd.cka_loss(student, modified)


@pytest.mark.parametrize("name", ["gram", "cosine relation", "similarity", "cka", "attention", "nst"])
@pytest.mark.parametrize("width", [2, 12])
def test_what_is_kept_has_the_digits_of_the_loss(name: str, width: int) -> None:
    """A student of float64 gets them from a teacher that one of float32 met before, too."""
    student, teacher = (x.flatten(2)[..., :width] if name in MAPS else x[:, :width] for x in problem(name))
    taught = fastkd.prepare_teacher(teacher)
    LOSSES[name](student, taught)
    got = call(LOSSES[name], student.double(), taught)
    torch.testing.assert_close(got, call(LOSSES[name], student.double(), teacher), rtol=1e-13, atol=1e-15)


def test_what_is_kept_is_computed_once() -> None:
    rows = [name for name in ROWS if name in ("gram", "cosine relation", "similarity", "cka")]
    for name in [*rows, "attention", "nst"]:
        student, teacher = problem(name)
        taught = fastkd.prepare_teacher(teacher)
        few = student[:5] if name in ROWS else student
        taught = fastkd.prepare_teacher(teacher[:5]) if name in ROWS else taught
        LOSSES[name](few, taught)
        kept = copy.copy(taught.kept)
        assert len(kept) == (0 if name == "similarity" else 1)  # few rows are compared by themselves
        LOSSES[name](few, taught)
        assert all(taught.kept[key] is kept[key] for key in kept)


@pytest.mark.parametrize("name", LOSSES)
def test_training_step(name: str) -> None:
    """Through layers before the loss."""
    student, teacher = problem(name)
    leaf = student.clone().requires_grad_()
    scaled = 3 * leaf
    LOSSES[name](scaled, teacher).mul(2).backward()
    torch.testing.assert_close(leaf.grad, 6 * call(LOSSES[name], 3 * student, teacher)[1])
