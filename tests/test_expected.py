"""A teacher known by its expected embedding: equal to the whole teacher, and refused wherever it would not be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_problems import INF, device_of, labels, moved, upstream
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import Expected, Head, TopK
from fastkd.testing import assert_as_exact_as_fp32, flat_logits, peaked_logits

pytestmark = pytest.mark.few_interpreted(41)  # its kernels have tests of their own
N, V, H = 5, 67, 8
X = 0.7 * flat_logits(N, H, seed=11)
W = flat_logits(V, H, seed=12)
B = flat_logits(1, V, seed=13)[0]
T = peaked_logits(N, V, seed=14)


def evaluate(impl: str, head: Head, teacher: Any, workspace: int | None = None, **options: Any) -> tuple[Tensor, ...]:
    """The loss of every row and the gradient of the hidden states."""
    device = device_of(impl)
    x = head.input.detach().to(device).requires_grad_()
    weight, bias = head.weight.to(device), None if head.bias is None else head.bias.to(device)
    student = Head(x, weight, bias, **head.options() | {"workspace": workspace})
    several = isinstance(teacher, list)
    given = [moved(one, device) for one in teacher] if several else moved(teacher, device)
    there = {name: y.to(device) if isinstance(y, Tensor) else y for name, y in options.items()}
    loss = fastkd.kd_loss(student, given, reduction="none", impl=impl, **there)
    (grad,) = torch.autograd.grad(loss, x, upstream(N).to(loss))
    return loss.detach().cpu(), grad.cpu()


def plain(
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    entropy: bool = True,
    squared: bool = True,
    target: Tensor | None = None,
    alpha: float = 0.5,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """By the expected embedding, in eager code; the teacher's moments always in float64."""
    p = (T.double() / temperature).softmax(-1)
    mean = (p @ W.to(dtype).double()).float()

    def compute(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        offset = 0.0 if bias is None else bias.to(x)
        z = scale * (leaf @ w.t() + offset)
        dot = scale * ((leaf * mean.to(x)).sum(-1) + (0.0 if bias is None else (p @ bias.double()).to(x)))
        value = (z / temperature).logsumexp(-1) - dot / temperature
        if entropy:
            value = value + (p * p.log()).sum(-1).to(x)
        loss = value * (temperature**2 if squared else 1.0)
        if target is not None:
            hard = F.cross_entropy(z, target, ignore_index=-100, reduction="none")
            loss = torch.where(target == -100, 0.0, alpha * hard + (1 - alpha) * loss)
        loss = loss if weight is None else loss * weight.to(x)
        (grad,) = torch.autograd.grad(loss, leaf, upstream(len(x)).to(loss))
        return loss.detach(), grad

    return compute


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": B},
    "temperature": {"temperature": 2.0, "bias": B},
    "no_scale_by_t2": {"temperature": 2.0, "squared": False},
    "scale": {"scale": 0.25, "bias": B},
    "hard": {"target": labels(N, V).index_fill(0, torch.tensor([1]), -100), "alpha": 0.3, "temperature": 0.5},
    "weights": {"weight": torch.linspace(0, 2, N)},
    "cross_entropy": {"entropy": False, "bias": B},
    "bfloat16": {"dtype": torch.bfloat16, "bias": B},
}


@pytest.mark.parametrize("workspace", [None, 2 * V * 4 + 1])
@pytest.mark.parametrize("case", CASES)
def test_exact(impl: str, case: str, workspace: int | None) -> None:
    options = CASES[case]
    dtype, bias = options.get("dtype", torch.float32), options.get("bias")
    weight, x = W.to(dtype), X.to(dtype)
    temperature = options.get("temperature", 1.0)
    made = Expected.from_teacher(T, weight, bias, temperature=temperature, entropy=options.get("entropy", True))
    given = {"temperature": temperature, "scale_by_t2": options.get("squared", True)}
    given |= {"target": options["target"], "alpha": options["alpha"]} if "target" in options else {}
    given |= {"row_weight": options["weight"]} if "weight" in options else {}
    head = Head(x, weight, bias, scale=options.get("scale", 1.0))
    got = evaluate(impl, head, made, workspace, **given)
    assert_as_exact_as_fp32(got, plain(**options), x, weight)
    assert float(got[1].abs().max()) > 1e-2


@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("entropy", [False, True])
def test_equal_to_the_whole_teacher(impl: str, divergence: str, entropy: bool) -> None:
    """Its value too, if its entropy is known; else forward KL has that of cross-entropy."""
    head = Head(X, W, B, scale=0.5)
    options: dict[str, Any] = {"temperature": 2.0, "target": labels(N, V), "alpha": torch.linspace(0, 1, N)}
    made = Expected.from_teacher(T, W, B, temperature=2.0, entropy=entropy)
    got = evaluate(impl, head, made, divergence=divergence, **options)
    value = divergence if entropy else "cross_entropy"
    torch.testing.assert_close(got[0], evaluate(impl, head, T, divergence=value, **options)[0], rtol=1e-5, atol=1e-5)
    want = evaluate(impl, head, T, divergence=divergence, **options)[1]
    torch.testing.assert_close(got[1], want, rtol=1e-5, atol=2e-5)


def test_beside_others(impl: str) -> None:
    """A whole teacher, k ids a row, and a second embedding, each by its weight in each row."""
    head = Head(X, W, B)
    other = flat_logits(N, V, seed=15)
    top = TopK.from_logits(other, 7)
    weight = torch.rand(N, 4)
    weight[1, 3], weight[2, 0] = 0, 0
    made, second = Expected.from_teacher(T, W, B), Expected.from_teacher(other, W, B)
    options: dict[str, Any] = {"target": labels(N, V), "alpha": 0.25}
    got = evaluate(impl, head, [made, top, other, second], teacher_weight=weight, workspace=1, **options)
    alone = [evaluate(impl, head, one, **options | {"alpha": 0.0}) for one in (T, top, other, other)]
    hard = evaluate(impl, head, T, **options | {"alpha": 1.0})
    for i in range(2):
        shares = [0.75 * weight[:, k].view(-1, *[1] * i) * alone[k][i] for k in range(4)]
        torch.testing.assert_close(got[i], 0.25 * hard[i] + sum(shares), rtol=1e-5, atol=2e-5)


def test_where_it_does_not_count_it_may_hold_anything(impl: str) -> None:
    made = Expected.from_teacher(T, W, B)
    target, alpha = labels(N, V).index_fill(0, torch.tensor([0]), -100), torch.tensor([0.5, 1.0, 0.5, 0.5, 0.0])
    options = {"target": target, "alpha": alpha, "row_weight": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])}
    for compact in (None, False):
        head = Head(X, W, B, compact=compact)
        want = evaluate(impl, head, made, **options)
        parts = [x.clone().index_fill(0, torch.tensor([0, 1, 2]), float("nan")) for x in made.tensors()]
        spoilt = Expected(parts[0], bias=parts[1], entropy=parts[2], checksum=made.checksum)
        for a, b in zip(evaluate(impl, head, spoilt, **options), want, strict=True):
            assert torch.equal(a, b)
        shares = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]).unsqueeze(1)
        want = evaluate(impl, head, made, teacher_weight=shares)
        for a, b in zip(evaluate(impl, head, spoilt, teacher_weight=shares), want, strict=True):
            assert torch.equal(a, b)
        loss, grad = evaluate(impl, head, spoilt)
        assert loss.isnan().tolist() == [True] * 3 + [False] * 2
        assert grad.isnan().any(-1).tolist() == [True] * 3 + [False] * 2


def test_masked_ids(impl: str) -> None:
    """A bias of -inf: nothing where the teacher has it too, infinite where it does not. Known by the same checksum."""
    bias, teacher = B.clone(), T.clone()
    bias[[3, 4, 9]] = -INF
    teacher[:4, [3, 4, 9]] = -INF
    got = evaluate(impl, Head(X, W, bias), Expected.from_teacher(teacher, W, bias))
    want = evaluate(impl, Head(X, W, bias), teacher)
    assert got[0].isposinf().tolist() == [False] * 4 + [True]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert bool((bias[[3, 4, 9]] == -INF).all())
    wide = bias.double()
    Expected.from_teacher(teacher, W.double(), wide)
    assert torch.equal(wide, bias.double())
    other = bias.clone()
    other[9], other[10] = 0.0, -INF
    with pytest.raises(ValueError, match="student must be the head that the Expected teacher was made with"):
        evaluate(impl, Head(X, W, other), Expected.from_teacher(teacher, W, bias))


def test_what_it_is_made_from() -> None:
    p = (T.double() / 1.5).softmax(-1)
    x, w = 0.3 * flat_logits(N, 3, seed=21), flat_logits(V, 3, seed=22)
    head = Head(x, w, B, softcap=5.0)
    of_head = head.logits().double().softmax(-1)
    fastkd.set_workspace(4 * V * 4 * 2)  # two rows at a time
    try:
        made = Expected.from_teacher(T.view(1, N, V), W.bfloat16(), B, temperature=1.5)
        headed = Expected.from_teacher(head, W, entropy=False)
    finally:
        fastkd.set_workspace(None)
    assert made.mean.shape == (1, N, H)
    assert made.temperature == 1.5
    torch.testing.assert_close(made.mean[0].double(), p @ W.bfloat16().double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.bias[0].double(), p @ B.double(), rtol=1e-5, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(made.entropy[0].double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)  # type: ignore
    torch.testing.assert_close(headed.mean.double(), of_head @ W.double(), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(Expected.from_teacher(head, W).mean, headed.mean)
    assert headed.entropy is None
    assert headed.bias is None
    with pytest.raises(ValueError, match=r"weight must have the teacher's vocabulary, 67, as its rows, got \(66, 8\)"):
        Expected.from_teacher(T, W[1:])
    with pytest.raises(
        TypeError, match=r"^Expected\.from_teacher: teacher must be a tensor of logits or a Head, got list"
    ):
        Expected.from_teacher([T], W)  # type: ignore[arg-type]
    assert Expected.from_teacher(T[:0], W).mean.shape == (0, H)


GIVEN = Expected.from_teacher(T, W)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any], dict[str, Any]]] = {
    "no head": (
        TypeError,
        "student must be a Head with an Expected teacher, got Tensor",
        lambda: flat_logits(N, V),
        {},
    ),
    "divergence": (
        ValueError,
        "divergence must be forward_kl or cross_entropy with an Expected teacher, got jsd",
        lambda: Head(X, W),
        {"divergence": "jsd"},
    ),
    "trained weight": (
        ValueError,
        "student.weight must not require a gradient with an Expected teacher, which is made for one frozen head, got",
        lambda: Head(X, W.clone().requires_grad_()),
        {},
    ),
    "trained bias": (
        ValueError,
        "student.bias must not require a gradient with an Expected teacher, which is made for one frozen head, got",
        lambda: Head(X, W, B.clone().requires_grad_()),
        {},
    ),
    "softcap": (
        ValueError,
        "student.softcap must be None with an Expected teacher, got 30.0",
        lambda: Head(X, W, softcap=30.0),
        {},
    ),
    "temperature": (
        ValueError,
        "teacher_temperature must be 1.0, at which the Expected teacher was recorded, got 2.0",
        lambda: Head(X, W),
        {"temperature": 2.0},
    ),
    "bias": (
        ValueError,
        "teacher.bias must be given exactly where the student's head has a bias, got none",
        lambda: Head(X, W, B),
        {},
    ),
    "hidden": (
        ValueError,
        "teacher.mean must have the student's hidden size, 9, got 8",
        lambda: Head(torch.zeros(N, 9), torch.zeros(V, 9)),
        {},
    ),
    "rows": (ValueError, "teacher must have the student's rows, (2,), got (5,)", lambda: Head(X[:2], W), {}),
    "shared_vocab": (
        ValueError,
        "shared_vocab must be None with an Expected teacher, which is over all of the student's ids, got one",
        lambda: Head(X, W),
        {"shared_vocab": V - 1},
    ),
    "vocab_map": (
        ValueError,
        "vocab_map must be None with an Expected teacher, which is over all of the student's ids, got one",
        lambda: Head(X, W),
        {"vocab_map": torch.arange(V)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, message, student, options = REFUSED[case]
    with pytest.raises(error, match="^kd_loss: " + re.escape(message)):
        fastkd.kd_loss(student(), GIVEN, **options)


def test_a_bias_that_the_student_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"teacher\.bias must be given exactly where the student's head has a bias, got one"
    ):
        fastkd.kd_loss(Head(X, W), Expected.from_teacher(T, W, B))


MADE: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "list": (TypeError, "Expected: mean must be a tensor, got list", lambda: Expected([1.0])),  # type: ignore[arg-type]
    "ids": (TypeError, "Expected: mean must be float16, bfloat16", lambda: Expected(torch.zeros(2, 3).long())),
    "0-dim": (ValueError, "Expected: mean must have a last dimension", lambda: Expected(torch.tensor(1.0))),
    "bias": (
        ValueError,
        "Expected: bias must have one number per row, (2,), got (3,)",
        lambda: Expected(torch.zeros(2, 3), bias=torch.zeros(3)),
    ),
    "device": (
        ValueError,
        "Expected: entropy must be where the mean is, cpu, got meta",
        lambda: Expected(torch.zeros(2, 3), entropy=torch.zeros(2, device="meta")),
    ),
    "temperature": (
        ValueError,
        "Expected: temperature must be positive",
        lambda: Expected(torch.zeros(2, 3), temperature=-1.0),
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_made_wrongly(case: str) -> None:
    error, message, make = MADE[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        make()


def test_only_the_weights_that_it_was_made_with() -> None:
    """One element off by one step of bfloat16 is another head; the same numbers elsewhere are not."""
    weight, bias = W.bfloat16(), B.clone()
    made = Expected.from_teacher(T, weight, bias)
    want = fastkd.kd_loss(Head(X, weight, bias), made)
    assert fastkd.kd_loss(Head(X, weight.clone(), bias.clone()), made) == want
    assert fastkd.kd_loss(Head(X, weight.float(), bias), made).isfinite()
    assert fastkd.kd_loss(Head(X, torch.nn.Parameter(weight, requires_grad=False), bias), made) == want

    def refused(weight: Tensor, bias: Tensor) -> None:
        with pytest.raises(
            ValueError, match=r"be the head that the Expected teacher was made with, got other weights$"
        ):
            fastkd.kd_loss(Head(X, weight, bias), made)

    for place in ((0, 0), (V - 1, H - 1), (31, 4)):
        near = weight.clone()
        near.view(torch.int16)[place] += 1
        refused(near, bias)
    refused(weight.flip(0), bias)
    refused(weight, bias.flip(0))
    refused(-weight, bias)
    swapped = weight.clone()
    swapped[[3, 4]] = weight[[4, 3]]
    refused(swapped, bias)
    with torch.no_grad():
        weight[5, 5] += 1
    refused(weight, bias)
    with torch.no_grad():
        weight[5, 5] = W.bfloat16()[5, 5]
    assert fastkd.kd_loss(Head(X, weight, bias), made) == want
    weight.data = torch.zeros(V, H, dtype=torch.bfloat16)
    refused(weight, bias)
    assert fastkd.kd_loss(Head(X, weight, bias), Expected(made.mean, bias=made.bias)).isfinite()  # not compared


def test_weights_of_inference_mode_are_looked_at_each_time() -> None:
    with torch.inference_mode():
        weight = W.clone()
    made = Expected.from_teacher(T, weight)
    assert fastkd.kd_loss(Head(X, weight), made).isfinite()
    with torch.inference_mode():
        weight[0, 0] += 1
    with pytest.raises(ValueError, match="got other weights"):
        fastkd.kd_loss(Head(X, weight), made)
