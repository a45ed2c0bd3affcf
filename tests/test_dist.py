"""dist_loss: every implementation against the published formula in float64, and where that is not finite."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feature_problems import call, judge
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd.testing import flat_logits, peaked_logits

IMPLEMENTATIONS = ("reference", "algebra")
INF, NAN = float("inf"), float("nan")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"gamma": 0.0},
    "columns": {"beta": 0.0, "gamma": 2.0},
    "temperature": {"temperature": 4.0, "beta": 0.5},
    "no_t2": {"temperature": 0.5, "scale_by_t2": False},
}


def published(
    beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, scale_by_t2: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    def pearson(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
        squared = temperature**2 if scale_by_t2 else 1.0
        return squared * (beta * (1 - pearson(q, p)) + gamma * (1 - pearson(q.T, p.T)))

    return loss


@pytest.mark.parametrize("logits", [flat_logits, peaked_logits])
@pytest.mark.parametrize("shape", [(13, 7), (5, 40), (2, 2), (300, 909)])
@pytest.mark.parametrize("options", OPTIONS)
def test_exact(impl: str, options: str, shape: tuple[int, int], logits: Callable[..., Tensor]) -> None:
    student, teacher = logits(*shape, seed=1) / 4, logits(*shape, seed=2) / 4  # else float64 has no digits of 1 - q
    judge(fastkd.dist_loss, published(**OPTIONS[options]), student, teacher, impl=impl, **OPTIONS[options])
    if shape != (2, 2):
        assert call(fastkd.dist_loss, student, teacher, impl=impl)[1].abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage(impl: str, dtype: torch.dtype) -> None:
    student, teacher = flat_logits(9, 33, seed=1, dtype=dtype), flat_logits(9, 33, seed=2)
    judge(fastkd.dist_loss, published(), student, teacher, impl=impl)
    assert fastkd.dist_loss(student, teacher.double(), impl=impl).dtype is torch.float64


def test_gradcheck(impl: str) -> None:
    student, teacher = flat_logits(5, 6, seed=1).double().requires_grad_(), flat_logits(5, 6, seed=2).double()
    for options in OPTIONS.values():
        assert torch.autograd.gradcheck(
            lambda s, options=options: fastkd.dist_loss(s, teacher, impl=impl, **options), (student,)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("classes", [3, 101])
def test_constant_rows_correlate_with_nothing(impl: str, classes: int, rows: int, dtype: torch.dtype) -> None:
    """A head that is zero at first gives them: the published slope there is 1e8, or NaN."""
    student, teacher = torch.full((rows, classes), 0.3, dtype=dtype), flat_logits(rows, classes, seed=1, dtype=dtype)
    loss, grad = call(fastkd.dist_loss, student, teacher, impl=impl)
    assert loss == 2
    assert not bool(grad.any())
    loss, grad = call(fastkd.dist_loss, teacher, student, impl=impl)
    assert loss == 2
    assert not bool(grad.any())


def test_a_batch_of_one_has_no_correlation_of_columns(impl: str) -> None:
    student, teacher = flat_logits(1, 9, seed=1), flat_logits(1, 9, seed=2)
    judge(fastkd.dist_loss, published(gamma=0.0), student, teacher, gamma=0.0, impl=impl)
    loss, grad = call(fastkd.dist_loss, student, teacher, impl=impl)
    of_rows, want = call(fastkd.dist_loss, student, teacher, gamma=0.0, impl=impl)
    torch.testing.assert_close(loss, of_rows + 1)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("rows", [7, 300])
def test_equal_rows_have_no_correlation_of_columns(impl: str, rows: int) -> None:
    student, teacher = flat_logits(1, 9, seed=1).expand(rows, 9), flat_logits(rows, 9, seed=2)
    loss, grad = call(fastkd.dist_loss, student, teacher, beta=0.0, impl=impl)
    assert loss == 1
    assert not bool(grad.any())


def test_no_rows_and_one_class(impl: str) -> None:
    for shape, want in (((0, 4), 0.0), ((3, 1), 2.0)):
        loss, grad = call(fastkd.dist_loss, torch.randn(shape), torch.randn(shape), impl=impl)
        assert loss == want
        assert grad.shape == shape
        assert not bool(grad.any())


@pytest.mark.parametrize("case", ["equal", "gaps", "masked", "masked_on_one_side", "opposite", "half", "lowest"])
def test_is_finite(impl: str, case: str) -> None:
    student, teacher = flat_logits(6, 9, seed=1), flat_logits(6, 9, seed=2)
    if case == "equal":
        teacher = student.clone()
    elif case == "gaps":
        student[:, 2], teacher[:, 5] = 1e4, 1e4
    elif case == "masked":
        student[:, :3] = teacher[:, :3] = -INF
    elif case == "masked_on_one_side":
        student[:, :3], teacher[2, 4:] = -INF, -INF
    elif case == "opposite":
        teacher = -student
    elif case == "half":
        student, teacher = (student * 6e4).clamp(-6e4, 6e4).half(), teacher.half()
    else:
        student[:, :3] = teacher[:, :3] = torch.finfo(torch.float32).min
    loss, grad = call(fastkd.dist_loss, student, teacher, impl=impl)
    assert bool(loss.isfinite())
    assert -1e-6 < float(loss) < 4 + 1e-6
    assert bool(grad.isfinite().all())
    if case == "equal":
        assert float(loss) < 1e-5


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("poison", [NAN, INF, "no_finite"])
def test_an_unusable_row_makes_the_loss_nan(impl: str, poison: float | str, side: int) -> None:
    tensors = [flat_logits(4, 9, seed=1), flat_logits(4, 9, seed=2)]
    tensors[side][2, slice(None) if poison == "no_finite" else 3] = -INF if poison == "no_finite" else poison
    assert bool(call(fastkd.dist_loss, *tensors, impl=impl)[0].isnan())


def test_layouts_and_dimensions(impl: str) -> None:
    student, teacher = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    flat = [x.movedim(1, -1).reshape(6, 7) for x in (student, teacher)]
    got, grad = call(fastkd.dist_loss, student, teacher, dim=1, impl=impl)
    want, want_grad = call(fastkd.dist_loss, *flat, impl=impl)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad.movedim(1, -1).reshape(6, 7), want_grad)
    got, grad = call(fastkd.dist_loss, flat[0].T.contiguous().T, flat[1][:, :].clone(), impl=impl)
    torch.testing.assert_close((got, grad), (want, want_grad))


def test_graph(impl: str) -> None:
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    before = student.detach().clone(), teacher.detach().clone()
    loss = fastkd.dist_loss(student, teacher, impl=impl)
    (a,) = torch.autograd.grad(loss, student, retain_graph=True)
    (b,) = torch.autograd.grad(loss, student, torch.tensor(-3.0), retain_graph=True)
    torch.testing.assert_close(b, -3 * a)
    (c,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        c.sum().backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(fastkd.dist_loss(student.detach(), teacher, impl=impl), loss)


def test_compiled(impl: str) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.dist_loss(student * 2, teacher, temperature=2.0, impl=impl)

    torch._dynamo.reset()
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(compiled, student, teacher), call(loss, student, teacher))


def test_any_block_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.algebra import dist

    student, teacher = flat_logits(23, 9, seed=1), flat_logits(23, 9, seed=2)
    want = call(fastkd.dist_loss, student, teacher)
    for rows in (1, 4, 23):
        monkeypatch.setattr(dist, "BLOCK", 9 * rows)
        torch.testing.assert_close(call(fastkd.dist_loss, student, teacher), want, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_a_certain_class_is_that_of_all_others() -> None:
    """Their sum is 0, also where each is far below the rounding of q near 1."""
    student, teacher = flat_logits(6, 33, seed=1), flat_logits(6, 33, seed=2)
    student[:, 4] += torch.tensor([10.0, 20, 25, 30, 35, 40])
    grad = call(fastkd.dist_loss, student, teacher)[1].double()
    assert bool((grad.abs().sum(1) > 0).all())
    assert bool((grad.sum(1).abs() < 1e-4 * grad.abs().sum(1)).all())


class Counted(TorchDispatchMode):
    """Operations whose result is new and as large as the logits."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, list[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if isinstance(result, Tensor) and result.numel() >= self.numel and not (function.is_view or name[-1] == "_"):
            self.names.append(name)
        return result


def test_blocks_are_all_that_is_allocated_beside_two_softmaxes() -> None:
    student, teacher = torch.randn(512, 4096, requires_grad=True), torch.randn(512, 4096)
    with Counted(student.numel()) as counted:
        fastkd.dist_loss(student, teacher)
    assert sorted(set(counted.names) - {"detach"}) == ["_softmax", "div"]
    assert len(counted.names) <= 8


S, T = torch.zeros(4, 5), torch.zeros(4, 5)
REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "student_type": (TypeError, "student must be a tensor of logits, got list", ([1.0], T), {}),
    "teacher_type": (TypeError, "teacher must be a tensor of logits, got list", (S, [T]), {}),
    "dtype": (TypeError, "student must be float16, bfloat16, float32 or float64, got torch.int64", (S.long(), T), {}),
    "0_dim": (ValueError, "student must have a class dimension, got a 0-dim tensor", (S[0, 0], T), {}),
    "shape": (ValueError, "teacher must have the student's shape, (4, 5), got (4, 4)", (S, T[:, :4]), {}),
    "device": (ValueError, "teacher must be on the student's device, cpu, got meta", (S, T.to("meta")), {}),
    "classes": (ValueError, "student must have at least one class, got shape (4, 0)", (S[:, :0], T[:, :0]), {}),
    "dim": (ValueError, "dim must be an integer from -2 to 1, got 2", (S, T), {"dim": 2}),
    "beta": (ValueError, "beta must be finite and not negative, got -1.0", (S, T), {"beta": -1}),
    "gamma": (ValueError, "gamma must be finite and not negative, got nan", (S, T), {"gamma": NAN}),
    "temperature": (
        ValueError,
        "temperature must be positive and finite in float32, got 0.0",
        (S, T),
        {"temperature": 0},
    ),
    "impl": (
        RuntimeError,
        "impl='triton' cannot run here: there is no fastkd_kernels.dist",
        (S, T),
        {"impl": "triton"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_message(case: str) -> None:
    error, message, args, options = REFUSED[case]
    with pytest.raises(error, match="^" + re.escape(f"dist_loss: {message}")):
        fastkd.dist_loss(*args, **options)


def test_the_published_formula_is_one_of_cosines() -> None:
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    q, p = student.softmax(1), teacher.softmax(1)
    rows = F.cosine_similarity(q - q.mean(1, keepdim=True), p - p.mean(1, keepdim=True), 1).mean()
    columns = F.cosine_similarity(q - q.mean(0), p - p.mean(0), 0).mean()
    torch.testing.assert_close(fastkd.dist_loss(student, teacher), 2 - rows - columns, rtol=1e-5, atol=1e-5)
