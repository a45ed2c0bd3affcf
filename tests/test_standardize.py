"""kd_loss(standardize=True): the published formula, what breaks it, and what it is refused with.

Values and gradients with every divergence, option and storage are tests of ``test_logit.py``.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from logit_problems import DIVERGENCES, STORAGE, evaluate
from torch import Tensor

import fastkd
from fastkd import Expected, Head, TopK, testing

INF, NAN = float("inf"), float("nan")
N, V = 4, 37
EVERY = [divergence for divergence in DIVERGENCES if divergence != "mse"]
SOME = ("forward_kl", "reverse_kl", "jsd")  # one pass, two passes, and one whose pieces are the hardest
pytestmark = pytest.mark.few_interpreted(11)


def published(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


def run(impl: str, student: Tensor, *teachers: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return evaluate(impl, student, *teachers, upstream=torch.ones(len(student)), standardize=True, **options)


def judged(impl: str, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    got = run(impl, student, teacher, **options)
    testing.assert_as_exact_as_fp32(got, lambda s, t: run("reference", s, t, **options), student, teacher)
    assert bool(got[1].isfinite().all())
    return got


def logits(seed: int) -> Tensor:
    return testing.flat_logits(N, V, seed=seed)


@pytest.mark.parametrize("divergence", EVERY)
def test_the_reference_is_the_published_formula(divergence: str) -> None:
    """By autograd through mean and std, with the plain loss of the standardised logits."""
    leaf, teacher, target = 5 + logits(1).double() * 3, logits(2).double(), torch.arange(N)
    leaf.requires_grad_()
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "reduction": "none", "impl": "reference"}
    soft = fastkd.kd_loss(published(leaf), published(teacher), **options)
    want = 0.3 * torch.nn.functional.cross_entropy(leaf, target, reduction="none") + 0.7 * soft
    (want_grad,) = torch.autograd.grad(want.sum(), leaf)
    got, grad = run(
        "reference", leaf.detach(), teacher, target=target, alpha=0.3, divergence=divergence, temperature=2.0
    )
    torch.testing.assert_close(got, want.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("divergence", SOME)
def test_far_from_zero(impl: str, divergence: str, offset: float) -> None:
    """A common offset costs no digits: sums of squares alone would have none left."""
    student, teacher = logits(1) + offset, logits(2) - offset
    testing.assert_as_exact_as_fp32(
        run(impl, student, teacher, divergence=divergence),
        lambda s, t: run("reference", s.double() - offset, t.double() + offset, divergence=divergence),
        student,
        teacher,
        copies=0,
        slack=[1e-5, 1e-5],
    )


@pytest.mark.parametrize("divergence", SOME)
def test_rows_longer_than_a_tile(impl: str, divergence: str) -> None:
    """Moments of tiles that lie far apart are put together."""
    n = 6500 if impl != "triton" or torch.cuda.is_available() else 300
    student, teacher = testing.flat_logits(2, n, seed=1), testing.flat_logits(2, n, seed=2)
    student += torch.linspace(-30, 60, n)
    teacher[:, n // 2 :] += 40
    judged(impl, student, teacher, divergence=divergence)


@pytest.mark.parametrize("divergence", EVERY)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_constant_rows(impl: str, divergence: str, dtype: torch.dtype) -> None:
    """z is 0 there; the published slope is 5.7e5 and has no bound, here it is 0. 0.3 is no float, and its mean may be
    another."""
    student, teacher = torch.full((N, 61), 0.3, dtype=dtype), testing.flat_logits(N, 61, seed=2, dtype=dtype)
    student[3] = -teacher[3]
    loss, grad = run(impl, student, teacher, divergence=divergence)
    assert bool((grad[:3] == 0).all())
    assert float(grad[3].abs().max()) > 1e-3
    want, _ = run("reference", torch.zeros(N, 61).double(), teacher.double(), divergence=divergence)
    torch.testing.assert_close(loss[:3].double(), want[:3], rtol=1e-5, atol=1e-6)
    loss, grad = run(impl, teacher, student, divergence=divergence)
    assert bool(loss.isfinite().all())
    assert bool(grad.isfinite().all())
    assert float(grad[:3].abs().max()) > 1e-4


@pytest.mark.parametrize("divergence", SOME)
def test_nearly_constant_rows_have_a_bounded_gradient(impl: str, divergence: str) -> None:
    student = 1 + logits(1) * 1e-6
    _, grad = run(impl, student, logits(2), divergence=divergence, temperature=2.0)
    assert bool(grad.isfinite().all())
    spread = 1e-7 + student.double().std(-1, keepdim=True)
    assert bool((grad.abs() * spread <= 20).all())


@pytest.mark.parametrize("divergence", EVERY)
def test_masked_vocabulary(impl: str, divergence: str) -> None:
    """The moments are those of the ids that are left, whatever the mask is made of."""
    masked = torch.arange(V) % 3 == 1
    student, teacher = logits(1), logits(2)
    want, want_grad = run(
        "reference", student[:, ~masked].double(), teacher[:, ~masked].double(), divergence=divergence
    )
    for mask in (-INF, torch.finfo(torch.float32).min, -1e30):
        loss, grad = run(
            impl, student.masked_fill(masked, mask), teacher.masked_fill(masked, mask), divergence=divergence
        )
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[:, ~masked].double(), want_grad, rtol=1e-4, atol=2e-6)
        assert bool((grad[:, masked] == 0).all())


@pytest.mark.parametrize("divergence", EVERY)
def test_masked_on_one_side(impl: str, divergence: str) -> None:
    for side in range(2):
        tensors = [logits(1), logits(2)]
        tensors[side][1:, 5] = -INF
        loss, _ = judged(impl, *tensors, divergence=divergence)
        infinite = divergence in (("forward_kl", "cross_entropy") if side == 0 else ("reverse_kl",))
        assert bool((loss[1:] == INF).all()) == infinite


@pytest.mark.parametrize("divergence", SOME)
def test_one_id_left(impl: str, divergence: str) -> None:
    """Without a deviation it is z = 0: certain on both sides."""
    student, teacher = torch.full((2, V), -INF), torch.full((2, V), -INF)
    student[:, 3], teacher[:, 3] = 5.0, -1.0
    loss, grad = run(impl, student, teacher, divergence=divergence)
    assert not bool(loss.any())
    assert not bool(grad.any())


@pytest.mark.parametrize("poison", [NAN, INF, "no_finite"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("divergence", SOME)
def test_unusable_row_is_nan_and_harms_no_other(impl: str, divergence: str, side: int, poison: float | str) -> None:
    tensors = [logits(1), logits(2)]
    clean = run(impl, *tensors, divergence=divergence)
    if poison == "no_finite":
        tensors[side][2] = -INF
    else:
        tensors[side][2, 11] = poison
    loss, grad = run(impl, *tensors, divergence=divergence)
    others = torch.tensor([0, 1, 3])
    assert bool(loss[2].isnan())
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("divergence", SOME)
def test_weight_0_silences_whatever_it_multiplies(impl: str, divergence: str) -> None:
    student, teacher, target = logits(1), logits(2), torch.arange(N)
    want = run(impl, student, teacher, target=target, divergence=divergence)
    bad, bad_teacher = student.clone(), teacher.clone()
    bad[1], bad_teacher[1] = NAN, INF
    others = torch.tensor([0, 2, 3])
    for options in (
        {"target": target.index_fill(0, torch.tensor([1]), -100)},
        {"target": target, "row_weight": torch.tensor([1.0, 0, 1, 1])},
    ):
        loss, grad = run(impl, bad, bad_teacher, divergence=divergence, **options)
        assert loss[1] == 0
        assert not bool(grad[1].any())
        assert torch.equal(loss[others], want[0][others])
        assert torch.equal(grad[others], want[1][others])
    got = run(impl, student, bad_teacher, target=target, alpha=1.0, divergence=divergence)
    assert bool(got[0].isfinite().all())
    got = run(impl, student, teacher, torch.full_like(teacher, NAN), teacher_weight=(1.0, 0.0), divergence=divergence)
    for one, other in zip(got, run(impl, student, teacher, divergence=divergence), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_logits_beyond_all_sense(impl: str) -> None:
    """No square of these fits into a float: no NaN comes of it, and no error."""
    loss, grad = run(impl, logits(1) * 1e25, logits(2) * 1e25)
    assert bool(loss.isfinite().all())
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("divergence", SOME)
def test_scale_and_offset_of_either_side_do_not_matter(impl: str, divergence: str) -> None:
    student, teacher = logits(1), logits(2)
    options: dict[str, Any] = {"divergence": divergence, "standardize": True, "impl": impl}
    want = fastkd.kd_loss(student, teacher, **options)
    torch.testing.assert_close(fastkd.kd_loss(student * 7 + 3, teacher / 5 - 1, **options), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_in_place_reduced_and_parts(impl: str, reduction: str) -> None:
    student, teacher, target = logits(1).requires_grad_(), logits(2), torch.arange(N)
    options: dict[str, Any] = {"standardize": True, "temperature": 2.0, "reduction": reduction, "impl": impl}
    loss, parts = fastkd.kd_loss(student, teacher, target, return_parts=True, **options)
    torch.testing.assert_close(0.5 * parts.hard + 0.5 * parts.soft, loss)
    assert parts.rows == N
    (want,) = torch.autograd.grad(loss, student)
    copy = student * 1
    loss = fastkd.kd_loss(copy, teacher, target, overwrite_student=True, **options)
    seen: list[Tensor] = []
    copy.register_hook(seen.append)
    loss.backward()
    assert seen[0].data_ptr() == copy.data_ptr()
    assert torch.equal(student.grad, want)  # type: ignore[arg-type]


def test_heads_and_mapped_vocabularies(impl: str) -> None:
    """A few rows at a time; the moments are those of the compared ids."""
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(V, 6, requires_grad=True)
    taught, target = torch.randn(5, 11), torch.arange(5)
    ids = torch.tensor([3, -1, 0, 7, 36, 20, -1, 1, 2, 30, 4])
    options: dict[str, Any] = {"standardize": True, "temperature": 2.0}
    of_head = fastkd.kd_loss(
        Head(hidden, weight, workspace=2 * V * 4), taught, target, vocab_map=ids, impl=impl, **options
    )
    student = hidden @ weight.T
    soft = fastkd.kd_loss(student[:, ids[ids >= 0]], taught[:, ids >= 0], impl="reference", **options)
    want = 0.5 * fastkd.cross_entropy(student, target, impl="reference") + 0.5 * soft
    torch.testing.assert_close(of_head, want, rtol=1e-5, atol=1e-6)
    for got, expected in zip(
        torch.autograd.grad(of_head, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_compiled(impl: str) -> None:
    student, teacher, target = torch.randn(2, 3, V), torch.randn(2, 3, V), torch.randint(V, (2, 3))
    torch._dynamo.reset()

    def loss(student: Tensor) -> Tensor:
        return fastkd.kd_loss(student * 2, teacher, target, standardize=True, temperature=2.0, impl=impl)

    leaf = student.requires_grad_()
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), loss(leaf)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(want, leaf))


@pytest.mark.few_interpreted(1)
@pytest.mark.parametrize(("divergence", "temperature", "shared"), [("forward_kl", 1.0, V), ("jsd", 2.0, V - 2)])
def test_the_state_means_the_same_everywhere(impl: str, divergence: str, temperature: float, shared: int) -> None:
    """One forward feeds another's backward; what is not looked at leaves zeros."""
    from fastkd._dispatch import _module
    from fastkd._rows import LogitRows

    rows = LogitRows(
        student=logits(1), teachers=(logits(2), logits(3)), target=torch.tensor([1, -100, 4, 0]), row_weight=None,
        alpha=torch.tensor([0.3, 0.3, 1.0, 0.0]), temperature=temperature,
        teacher_temperature=(1.0, 2.0),
        teacher_weight=torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), divisor=None,
        divergence=divergence, beta=0.3, scale_by_t2=True, label_smoothing=0.1, z_loss=0.01, ignore_index=-100,
        shared=shared, reduce=True, agreement=True, overwrite=False, standardize=True,
    )  # fmt: skip
    here, there = _module(impl, "logit"), _module("reference", "logit")
    (_, state, scale), (_, want_state, want_scale) = here.forward(rows), there.forward(rows)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)
    upstream = torch.tensor(1.3)
    want = there.backward(rows, want_state, want_scale, upstream)
    torch.testing.assert_close(there.backward(rows, state, scale, upstream), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(here.backward(rows, want_state, want_scale, upstream), want, rtol=1e-4, atol=1e-6)


def test_a_row_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU few rows are shared out; the moments of the parts lie far apart, and one part is masked."""
    kernels = pytest.importorskip("fastkd_kernels.logit")
    n = 20_011 if torch.cuda.is_available() else 151
    student, teacher = testing.flat_logits(2, n, seed=1), testing.flat_logits(2, n, seed=2)
    student[:, n // 2 :] += 20
    student[1, : n // 2], teacher[1, : n // 2] = -INF, -INF
    whole = run("triton", student, teacher, temperature=2.0)
    monkeypatch.setattr(kernels, "_parts", lambda *_: 3)
    for got, want in zip(run("triton", student, teacher, temperature=2.0), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


HEAD = Head(torch.randn(8, 4), torch.randn(100, 4))
S, T = torch.zeros(8, 100), torch.zeros(8, 100)
TOPK = TopK(torch.zeros(8, 1, dtype=torch.long), torch.zeros(8, 1))
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "mse": ("be False for mse, which compares raw logits", (S, T), {"divergence": "mse"}),
    "topk": ("be False unless every teacher has logits", (S, TOPK), {}),
    "one_topk": ("be False unless every teacher has logits", (S, [T, TOPK]), {}),
    "expected": ("be False unless every teacher has logits", (HEAD, Expected(torch.zeros(8, 4))), {}),
    "student_topk": ("be False with student_topk", (S, T), {"student_topk": 3, "divergence": "reverse_kl"}),
    "one_class": ("be False for one class, which has no standard deviation", (S[:, :1], T[:, :1]), {}),
    "one_shared": ("be False for one class, which has no standard deviation", (S, T), {"shared_vocab": 1}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_message(case: str) -> None:
    message, args, options = REFUSED[case]
    with pytest.raises(ValueError, match="^" + re.escape(f"kd_loss: standardize must {message}, got True")):
        fastkd.kd_loss(*args, standardize=True, **options)
