"""dkd_loss and nkd_loss in use: arguments and their refusals, heads, reductions, graphs, compiled and exported."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoupled_problems import CASES, evaluate, tensors
from torch import Tensor, nn

import fastkd
from fastkd import Head
from fastkd.testing import assert_as_exact_as_fp32, peaked_logits

N, V = 5, 43
pytestmark = pytest.mark.few_interpreted(7)
LOSSES = {"dkd_loss": fastkd.dkd_loss, "nkd_loss": fastkd.nkd_loss}
CALLS = {
    "dkd": lambda s, t, y, **options: fastkd.dkd_loss(s, t, y, **options),
    "nkd": lambda s, t, y, **options: fastkd.nkd_loss(s, t, y, **options),
    "nkd_at_2": lambda s, t, y, **options: fastkd.nkd_loss(s, t, y, temperature=2.0, **options),
}
S, T, Y = torch.zeros(8, 100), torch.zeros(8, 100), torch.zeros(8, dtype=torch.long)

REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "student_type": (TypeError, "student must be a tensor of logits or a Head, got list", ([1.0], T, Y), {}),
    "teacher_type": (TypeError, "teacher must be a tensor of logits or a Head, got list", (S, [T], Y), {}),
    "teacher_topk": (
        TypeError,
        "teacher must be a tensor of logits or a Head, got TopK",
        (S, fastkd.TopK(Y[:, None], torch.zeros(8, 1)), Y),
        {},
    ),
    "teacher_shape": (
        ValueError,
        "teacher must have the student's shape, (8, 100), got (7, 100)",
        (S, T[:7], Y),
        {},
    ),
    "target_type": (TypeError, "target must be a tensor of class ids, got None", (S, T, None), {}),
    "target_dtype": (TypeError, "target must hold integer class ids, got torch.float32", (S, T, Y.float()), {}),
    "target_id": (ValueError, "target must hold ids from 0 to 99, or ignore_index=-100, got 100", (S, T, Y + 100), {}),
    "temperature": (
        ValueError,
        "temperature must be positive and finite in float32, got 0.0",
        (S, T, Y),
        {"temperature": 0},
    ),
    "temperature_of_a_row": (
        ValueError,
        "temperature must be positive and finite in every row, got -1.0",
        (S, T, Y),
        {"temperature": torch.linspace(7, -1, 8)},
    ),
    "row_weight": (TypeError, "row_weight must be a tensor with one number per row", (S, T, Y), {"row_weight": 1.0}),
    "reduction": (
        ValueError,
        "reduction must be one of none, sum, mean, batchmean, got 'avg'",
        (S, T, Y),
        {"reduction": "avg"},
    ),
    "normalizer": (
        ValueError,
        "normalizer must be finite and not negative, got -3.0",
        (S, T, Y),
        {"normalizer": torch.tensor(-3.0)},
    ),
    "impl": (
        ValueError,
        "impl must be one of triton, native, reference, got 'cuda'",
        (S, T, Y),
        {"impl": "cuda"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("op", LOSSES)
def test_message(op: str, case: str) -> None:
    error, message, args, options = REFUSED[case]
    with pytest.raises(error, match="^" + re.escape(f"{op}: {message}")):
        LOSSES[op](*args, **options)


@pytest.mark.parametrize(("op", "name"), [("dkd_loss", "alpha"), ("dkd_loss", "beta"), ("nkd_loss", "gamma")])
def test_weights_are_not_negative(op: str, name: str) -> None:
    for value, got in ((-1, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf")):
        with pytest.raises(ValueError, match=f"^{op}: {name} must be finite and not negative, got {got}"):
            LOSSES[op](S, T, Y, **{name: value})
    with pytest.raises(TypeError, match=f"^{op}: {name} must be a number, got str"):
        LOSSES[op](S, T, Y, **{name: "1"})


@pytest.mark.parametrize("pinned", ["reference", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("case", ["target_id", "temperature_of_a_row", "normalizer"])
def test_data_is_checked_by_every_cpu_implementation(pinned: str, case: str) -> None:
    error, message, args, options = REFUSED[case]
    for op, loss in LOSSES.items():
        with pytest.raises(error, match="^" + re.escape(f"{op}: {message}")):
            loss(*args, **options, impl=pinned)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    return peaked_logits(N, V, seed=1), peaked_logits(N, V, seed=2), torch.tensor([3, -100, 0, 42, 7])


def loss_and_grad(loss: Callable[..., Tensor], student: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *args, **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "normalizer"])
@pytest.mark.parametrize("call", CALLS)
def test_a_reduced_loss_is_the_sum_of_its_rows(
    impl: str, call: str, reduction: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, target = problem
    weight = torch.tensor([1.0, 5.0, 0.0, 0.5, 2.0])
    divisor = {"sum": 1.0, "mean": 3.5, "batchmean": float(N), "normalizer": 7.0}[reduction]
    options = {"reduction": "mean", "normalizer": 7} if reduction == "normalizer" else {"reduction": reduction}
    got = loss_and_grad(CALLS[call], student, teacher, target, row_weight=weight, impl=impl, **options)

    def rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        numbers = {"row_weight": weight, "reduction": "none", "impl": "reference"}
        loss, grad = loss_and_grad(CALLS[call], student, teacher, target, **numbers)
        return loss / divisor, grad / divisor

    assert_as_exact_as_fp32(got, rows, student, teacher)


@pytest.mark.parametrize("call", CALLS)
def test_maps_and_leading_dimensions(impl: str, call: str) -> None:
    student, teacher, target = torch.randn(2, 7, 3), torch.randn(2, 7, 3), torch.randint(7, (2, 3))
    got, grad = loss_and_grad(CALLS[call], student, teacher, target, dim=1, reduction="none", impl=impl)
    flat = [x.movedim(1, -1).reshape(6, 7) for x in (student, teacher)]
    want, want_grad = loss_and_grad(CALLS[call], *flat, target.reshape(6), reduction="none", impl=impl)
    assert torch.equal(got.reshape(6), want)
    assert torch.equal(grad.movedim(1, -1).reshape(6, 7), want_grad)
    got, _ = loss_and_grad(CALLS[call], student[0, :, 0], teacher[0, :, 0], target[0, 0], impl=impl)
    torch.testing.assert_close(got, want[0])


@pytest.mark.parametrize("call", CALLS)
def test_layouts(impl: str, call: str) -> None:
    plain, teacher, target = peaked_logits(6, 65), peaked_logits(6, 65, seed=1), torch.arange(6) * 12
    want = loss_and_grad(CALLS[call], plain, teacher, target, impl=impl)
    for layout in (
        lambda x: torch.cat([x.new_full((6, 5), 50.0), x, x.new_full((6, 6), 50.0)], 1)[:, 5:-6],
        lambda x: torch.stack([x, x + 1], 1)[:, 0],
    ):
        got = loss_and_grad(CALLS[call], layout(plain), layout(teacher), layout(target[:, None])[:, 0], impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
def test_graph(impl: str, call: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Twice through a retained graph with different gradients from above, no second derivative, teacher constant."""
    student, teacher, target = problem
    leaf = student.requires_grad_()
    loss = CALLS[call](leaf, teacher.requires_grad_(), target, reduction="none", impl=impl)
    first, second = torch.linspace(1, 2, N), torch.linspace(-3, 0.5, N)
    (a,) = torch.autograd.grad(loss, leaf, first, retain_graph=True)
    (b,) = torch.autograd.grad(loss, leaf, second, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, first, create_graph=True)
    torch.testing.assert_close(b, a * (second / first).unsqueeze(1), rtol=1e-5, atol=1e-7)
    assert torch.equal(again, a)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        again.square().sum().backward()
    with torch.no_grad():
        assert torch.equal(CALLS[call](leaf, teacher, target, reduction="none", impl=impl), loss.detach())
    one_row = leaf[:1] * 1  # the state of one row is contiguous whatever is cut from it
    loss = CALLS[call](one_row, teacher[:1], target[:1], impl=impl)
    (a,) = torch.autograd.grad(loss, one_row, retain_graph=True)
    (b,) = torch.autograd.grad(loss, one_row)
    assert torch.equal(a, b)


@pytest.mark.parametrize("call", CALLS)
def test_changed_in_place_before_backward(impl: str, call: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    loss = CALLS[call](student.requires_grad_(), teacher, target, impl=impl)
    target.fill_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


@pytest.mark.parametrize("call", CALLS)
def test_overwrite_student(impl: str, call: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    leaf = student.requires_grad_()
    (want,) = torch.autograd.grad(CALLS[call](leaf * 1, teacher, target, impl=impl), leaf)
    logits = leaf * 1
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    CALLS[call](logits, teacher, target, overwrite_student=True, impl=impl).backward()
    assert seen[0].data_ptr() == logits.data_ptr()
    assert torch.equal(leaf.grad, want)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", CALLS)
def test_heads(impl: str, call: str) -> None:
    """A few rows at a time: the same loss, and the gradients of hidden states and weight."""
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(V, 6, requires_grad=True)
    taught, matrix, target = torch.randn(7, 4), torch.randn(V, 4), torch.arange(7) * 6
    target[2] = -100
    head = Head(hidden, weight, workspace=3 * V * 4)
    for teacher in (Head(taught, matrix), taught @ matrix.T):
        loss = CALLS[call](head, teacher, target, impl=impl)
        want = CALLS[call](hidden @ weight.T, taught @ matrix.T, target, impl="reference")
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for got, expected in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
def test_compiled(impl: str, call: str) -> None:
    student, teacher, target, weight = (
        torch.randn(2, 3, V),
        torch.randn(2, 3, V),
        torch.randint(V, (2, 3)),
        torch.rand(2, 3),
    )
    function = CALLS[call]
    torch._dynamo.reset()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        rows = function(student * 2, teacher, target, row_weight=weight, reduction="none", impl=impl)
        return rows.square().sum()

    got = loss_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, teacher)
    torch.testing.assert_close(got, loss_and_grad(loss, student, teacher))


def test_compiled_heads(impl: str) -> None:
    hidden, weight, teacher = torch.randn(N, 6), torch.randn(V, 6), torch.randn(N, V)

    def loss(hidden: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.dkd_loss(Head(hidden, weight), teacher, torch.arange(N), impl=impl)

    got = loss_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), hidden, teacher)
    torch.testing.assert_close(got, loss_and_grad(loss, hidden, teacher))


@pytest.mark.parametrize("call", CALLS)
def test_export(call: str) -> None:
    class Criterion(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            return CALLS[call](student, teacher, target)

    args = torch.randn(N, V), torch.randn(N, V), torch.randint(V, (N,))
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(Criterion(), args, dynamic_shapes=[{0: rows}] * 3)
    more = torch.randn(11, V), torch.randn(11, V), torch.randint(V, (11,))
    assert torch.equal(program.module()(*more), Criterion()(*more))
    assert [n.name for n in program.graph.nodes if "fastkd" in str(n.target)] == ["logit_forward"]


def test_autocast_and_inference_mode(impl: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    for call in CALLS.values():
        want = call(student, teacher, target, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            taught = teacher.clone()
            assert torch.equal(call(student, taught, target, impl=impl), want)
        leaf = student.detach().requires_grad_()
        call(leaf, taught, target, impl=impl).backward()
        assert leaf.grad is not None


def test_same_bits_twice(impl: str) -> None:
    student, teacher, target = tensors(5, 45 if impl == "triton" else 301, "peaked", torch.float32)
    for case in ("dkd", "nkd_at_2"):
        first, second = (evaluate(impl, case, student, teacher, target) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_every_operation_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for op in {op for op, _ in CASES.values()}:
        fastkd.explain(op, torch.zeros(2, 3))
        assert "native     ok" in capsys.readouterr().out
