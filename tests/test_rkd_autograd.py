"""Losses on pairs of rows as parts of a program: autograd, tracing, autocast, threads, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from feature_problems import call, flat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from bench import memory
from bench.measure import Contender
from fastkd.losses._logit_autograd import NO_SECOND_DERIVATIVE

IMPLEMENTATIONS = ("reference", "algebra", "native")

Loss = Callable[..., Tensor]
LOSSES = {"distance": fastkd.rkd_distance_loss, "angle": fastkd.rkd_angle_loss}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_upstream_gradients_and_a_second_backward(impl: str, loss: Loss) -> None:
    student, teacher = flat(7, 4), flat(7, 3, 1)
    _, grad = call(loss, student, teacher, impl=impl)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, impl=impl)
    (3 * value).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * grad)
    value.backward()
    torch.testing.assert_close(leaf.grad, 4 * grad)
    assert torch.equal(student, leaf)


@each_loss
def test_the_teacher_is_a_constant(impl: str, loss: Loss) -> None:
    student, teacher = flat(7, 4).requires_grad_(), flat(7, 3, 1).requires_grad_()
    loss(student, teacher, impl=impl).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not loss(student.detach(), teacher, impl=impl).requires_grad


@each_loss
def test_no_second_derivative(impl: str, loss: Loss) -> None:
    student = flat(6, 4).requires_grad_()
    (grad,) = torch.autograd.grad(loss(student, flat(6, 3, 1), impl=impl), student, create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        grad.sum().backward()
    assert NO_SECOND_DERIVATIVE in str(raised.value)


@each_loss
def test_without_a_gradient(impl: str, loss: Loss) -> None:
    student, teacher = flat(6, 4), flat(6, 3, 1)
    value = loss(student, teacher, impl=impl)
    with torch.no_grad():
        assert torch.equal(loss(student.requires_grad_(), teacher, impl=impl), value)
    with torch.inference_mode():
        assert torch.equal(loss(student.detach().clone(), teacher.clone(), impl=impl), value)


@each_loss
def test_autocast_does_not_round(impl: str, loss: Loss) -> None:
    student, teacher = flat(6, 4), flat(6, 3, 1)
    value, grad = call(loss, student, teacher, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, slope = call(loss, student, teacher, impl=impl)
    assert torch.equal(got, value)
    assert torch.equal(slope, grad)


@each_loss
@pytest.mark.parametrize("prepared", [False, True])
def test_compile(impl: str, loss: Loss, prepared: bool) -> None:
    torch._dynamo.reset()  # else the recompilations of all cases count against one limit
    teacher = flat(6, 3, 1)
    taught = fastkd.prepare_teacher(teacher) if prepared else teacher
    if prepared:
        loss(flat(6, 4), taught, normalize_rows=True, impl=impl)

    def step(student: Tensor, _: None = None) -> Tensor:
        return 2 * loss(student * 1, taught, delta=0.5, normalize_rows=True, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (0, 2):
        torch.testing.assert_close(call(compiled, flat(6, 4, seed), None), call(step, flat(6, 4, seed), None))
    with torch.no_grad():
        torch.testing.assert_close(compiled(flat(6, 4)), step(flat(6, 4)))


@each_loss
def test_export(loss: Loss) -> None:
    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return loss(student, teacher)

    student, teacher = flat(6, 4), flat(6, 3, 1)
    program = torch.export.export(Module(), (student, teacher))
    assert torch.equal(program.module()(student, teacher), loss(student, teacher))


@pytest.mark.native
@each_loss
def test_the_same_bits_every_time_with_any_number_of_threads(loss: Loss) -> None:
    student, teacher = flat(150, 40), flat(150, 33, 1)
    value, grad = call(loss, student, teacher, impl="native")
    for threads in (1, 2, 3, 3, 5):
        torch.set_num_threads(threads)
        again, slope = call(loss, student, teacher, impl="native")
        assert torch.equal(again, value)
        assert torch.equal(slope, grad)


class Largest(TorchDispatchMode):
    """The most elements that an operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_angles_need_no_array_of_all_angles() -> None:
    """Of 180 rows they are 6 million; of 1024 a billion."""
    student, teacher = flat(180, 5), flat(180, 7, 1)
    with Largest() as largest:
        exact = call(fastkd.rkd_angle_loss, student, teacher, impl="algebra")
    assert largest.numel <= 2**22
    with Largest() as largest:
        got = call(fastkd.rkd_angle_loss, student, teacher, impl="native")
    assert largest.numel == 180**2
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-10)


@pytest.mark.native
def test_a_thousand_rows() -> None:
    """A billion angles, in the memory of a dozen N x N matrices."""
    student, teacher = flat(1024, 4).requires_grad_(), flat(1024, 3, 1)

    def run() -> tuple[Tensor, ...]:
        value = fastkd.rkd_angle_loss(student, teacher, impl="native")
        (grad,) = torch.autograd.grad(value, student)
        assert 0 < value < 0.5
        assert grad.isfinite().all()
        return value.detach(), grad

    peak = memory.peak(Contender("fastkd", run), torch.device("cpu"), ())
    assert peak is None or peak.beside_inputs < 14 * 1024**2 * 8


@pytest.mark.parametrize("loss", [fastkd.rkd_distance_loss, fastkd.rkd_angle_loss, fastkd.pkt_loss])
def test_signs_that_torch_has_not_changed_yet(loss: Loss) -> None:
    student, teacher = flat(9, 4), flat(9, 5, 1)
    lazily = torch._neg_view(student), torch._neg_view(teacher)
    for got, want in zip(call(loss, *lazily), call(loss, -student, -teacher), strict=True):
        assert torch.equal(got, want)
