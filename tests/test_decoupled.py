"""dkd_loss and nkd_loss: the reference against the published formulas, every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoupled_problems import CASES, answer, evaluate, naive, tensors, upstream
from logit_problems import STORAGE
from torch import Tensor

import fastkd
from fastkd import testing

ON_CPU = not torch.cuda.is_available()


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_published_formula(case: str) -> None:
    for logits in ("flat", "peaked"):
        student, teacher, target = tensors(5, 11, logits, torch.float64)
        if logits == "peaked":  # 1 - p in the published code has no digits left where p nears 1
            student, teacher = student / 4, teacher / 4
        leaf = student.clone().requires_grad_()
        want = naive(case, leaf, teacher, target)
        (want_grad,) = torch.autograd.grad(want, leaf, upstream(5))
        got, grad = evaluate("reference", case, student, teacher, target)
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-12)
        assert float(grad.abs().max()) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    op, options = CASES[case]
    student, teacher, target = tensors(3, 7, "flat", torch.float64)

    def loss(student: Tensor) -> Tensor:
        return getattr(fastkd, op)(student, teacher, target, reduction="none", impl="reference", **options(3))

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


def check(impl: str, case: str, rows: int, vocabulary: int, logits: str, dtype: torch.dtype) -> None:
    exact, error = answer(case, rows, vocabulary, logits, dtype)
    got = evaluate(impl, case, *tensors(rows, vocabulary, logits, dtype))
    for i, (one, want, bound) in enumerate(zip(got, exact, error, strict=True)):
        testing._check(i, one, want, bound, 256.0, 0.0)
    if vocabulary > 2:
        assert float(exact[1].abs().max()) > 1e-4, "the expected gradient is next to nothing: the test could not fail"


@pytest.mark.few_interpreted(13)
@pytest.mark.parametrize("logits", ["peaked", "flat"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_exact(impl: str, case: str, dtype: torch.dtype, logits: str) -> None:
    small = impl == "triton" and ON_CPU
    check(impl, case, 3 if small else 4, 97 if small else 300, logits, dtype)


@pytest.mark.parametrize("logits", ["peaked", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_float32_reference_is_good_enough_to_set_the_bar(case: str, logits: str) -> None:
    for value, bound in zip(*answer(case, 8, 1009, logits, torch.float32), strict=True):
        scale = value.reshape(len(value), -1).abs().amax(-1)
        assert bool((bound <= 2**-16 * scale + 1e-12).all()), (bound / scale).max()


@pytest.mark.parametrize("case", ["dkd", "nkd", "nkd_at_2"])
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 300), (3, 2), (3, 1), (2, 1009), (2, 2047), (2, 2049), (2, 4113), (65, 17)]
)
def test_shapes(impl: str, case: str, rows: int, vocabulary: int) -> None:
    if impl == "triton" and ON_CPU and rows * vocabulary > 500:
        pytest.skip("interpreted: small vocabularies")
    check(impl, case, rows, vocabulary, "peaked", torch.bfloat16)


@pytest.mark.parametrize("case", ["dkd", "nkd_at_2"])
def test_maxima_that_rise_from_tile_to_tile(impl: str, case: str) -> None:
    check(impl, case, 2, 150 if impl == "triton" and ON_CPU else 6200, "rising", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["dkd", "nkd_at_2"])
def test_labels_on_the_edges_of_tiles(impl: str, case: str, dtype: torch.dtype) -> None:
    """The target is left out wherever it stands, whether its tile is read in place or copied, and it alone."""
    small = impl == "triton" and ON_CPU
    vocabulary = 97 if small else 4112 if dtype is torch.float32 else 2050
    edges = (
        [0, 63, 96]
        if small
        else [0, 1, 15, 16, 31, 63, 64, 96, 511, 512, 1023, 1024, 2047, 2048, 2049, 4095, 4096, 4111]
    )
    labels = torch.tensor([label for label in edges if label < vocabulary])
    student = testing.flat_logits(len(labels), vocabulary, seed=1, dtype=dtype)
    teacher = testing.flat_logits(len(labels), vocabulary, seed=2, dtype=dtype)
    rows = torch.arange(len(labels))
    student[rows, labels], teacher[rows, labels] = 12.0, 15.0  # left in, it would be all there is
    testing.assert_as_exact_as_fp32(
        evaluate(impl, case, student, teacher, labels),
        lambda s, t: evaluate("reference", case, s, t, labels),
        student,
        teacher,
    )


@pytest.mark.few_interpreted(6)
@pytest.mark.parametrize("case", CASES)
def test_targets_of_every_certainty(impl: str, case: str) -> None:
    """From no chance to certain, on either side: 1 - q_y keeps its digits."""
    n = 5 if impl == "triton" and ON_CPU else 40
    student, teacher = testing.flat_logits(n, 97, seed=1), testing.flat_logits(n, 97, seed=2)
    student[:, 5] += torch.linspace(-30, 30, n)
    teacher[:, 5] += torch.linspace(20, -10, n)
    target = torch.full((n,), 5)
    testing.assert_as_exact_as_fp32(
        evaluate(impl, case, student, teacher, target),
        lambda s, t: evaluate("reference", case, s, t, target),
        student,
        teacher,
    )


def test_two_that_are_certain_are_told_apart(impl: str) -> None:
    """At 1 - q_y of 1e-18 and less, which no q_y shows: the gradient is p_y - q_y from the smaller probabilities."""
    student, teacher, target = torch.zeros(2, 33), torch.zeros(2, 33), torch.tensor([7, 7])
    student[:, 7], teacher[:, 7] = torch.tensor([45.0, 50.0]), torch.tensor([50.0, 45.0])
    _, grad = evaluate(impl, "dkd_of_the_target", student, teacher, target)
    odds = [x[:, 7].double() - torch.tensor(32.0).double().log() for x in (student, teacher)]
    want = upstream(2) * (torch.sigmoid(-odds[1]) - torch.sigmoid(-odds[0]))
    torch.testing.assert_close(grad[:, 7].double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, 3].double(), -want / 32, rtol=1e-5, atol=0)


def test_teacher_of_another_dtype(impl: str) -> None:
    student, teacher, target = tensors(3, 97, "peaked", torch.bfloat16)
    for case in ("dkd", "nkd", "nkd_at_2"):
        testing.assert_as_exact_as_fp32(
            evaluate(impl, case, student, teacher.float(), target),
            lambda s, t, case=case: evaluate("reference", case, s, t, target),
            student,
            teacher.float(),
        )
    loss, grad = evaluate(None, "nkd_at_2", student, teacher.double(), target)
    assert loss.dtype is torch.float64
    assert grad.dtype is torch.bfloat16


def test_parts_of_dkd_are_those_of_the_kullback_leibler_divergence(impl: str) -> None:
    """KL(p | q) = tckd + (1 - p_y) nckd."""
    student, teacher, target = (x.cpu() for x in tensors(4, 33, "flat", torch.float32))
    weight = 1 - (teacher / 2).softmax(-1).gather(1, target[:, None])[:, 0]
    options = {"temperature": 2.0, "reduction": "none"}
    of_target = fastkd.dkd_loss(student, teacher, target, alpha=1.0, beta=0.0, impl=impl, **options)
    others = fastkd.dkd_loss(student, teacher, target, alpha=0.0, beta=1.0, row_weight=weight, impl=impl, **options)
    torch.testing.assert_close(of_target + others, fastkd.kd_loss(student, teacher, impl=impl, **options))


def test_nkd_without_the_others_is_weighted_cross_entropy(impl: str) -> None:
    student, teacher, target = tensors(4, 33, "flat", torch.float32)
    p = teacher.softmax(-1).gather(1, target[:, None])[:, 0]
    for temperature in (1.0, 3.0):
        got = fastkd.nkd_loss(student, teacher, target, gamma=0.0, temperature=temperature, reduction="none", impl=impl)
        torch.testing.assert_close(got, p * F.cross_entropy(student, target, reduction="none"))


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 2.0), (3.0, 1.0)])
def test_without_the_target_the_state_means_the_same_everywhere(impl: str, share: float, temperature: float) -> None:
    """One forward feeds another's backward, a hard term beside; a teacher of weight 0 is looked at all the same."""
    from fastkd._dispatch import _module
    from fastkd._rows import SOFT, LogitRows

    student, teacher, target = tensors(4, 43, "flat", torch.float32)
    student[2, 5], target[3] = -torch.inf, -100
    rows = LogitRows(
        student=student, teachers=(teacher,), target=target, row_weight=None, alpha=0.3,
        temperature=temperature, teacher_temperature=(2.0,), teacher_weight=(share,), divisor=None,
        divergence="forward_kl", beta=0.0, scale_by_t2=True, label_smoothing=0.0, z_loss=0.01, ignore_index=-100,
        shared=43, reduce=True, agreement=False, overwrite=False, without_target=True,
        label_slope=torch.tensor([0.5, -0.25, 1.0, 0.0]),
    )  # fmt: skip
    here, there = _module(impl, "logit"), _module("reference", "logit")
    (_, state, scale), (_, want_state, want_scale) = here.forward(rows), there.forward(rows)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)
    assert want_state[:, SOFT].isinf().tolist() == [False, False, share != 0, False]
    above = torch.tensor(1.3)
    want = there.backward(rows, want_state, want_scale, above)
    torch.testing.assert_close(there.backward(rows, state, scale, above), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(here.backward(rows, want_state, want_scale, above), want, rtol=1e-4, atol=1e-6)
    assert bool((want[3] == 0).all())


@pytest.mark.parametrize("case", ["dkd", "nkd_at_2"])
def test_a_row_in_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU few rows are shared out: to a part with the target, to others, and to one that is masked but for it."""
    kernels = pytest.importorskip("fastkd_kernels.logit")
    n = 20_011 if not ON_CPU else 151
    student, teacher = testing.flat_logits(2, n, seed=1), testing.flat_logits(2, n, seed=2)
    target = torch.tensor([n // 2, 5])
    student[1, : n // 2], teacher[1, : n // 2] = -torch.inf, -torch.inf
    student[1, 5], teacher[1, 5] = 3.0, 2.0
    whole = evaluate("triton", case, student, teacher, target)
    monkeypatch.setattr(kernels, "_parts", lambda *_: 3)
    for got, want in zip(evaluate("triton", case, student, teacher, target), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
