"""Losses of maps: every implementation against the published code in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from feature_problems import call, judge
from test_gram import Largest
from torch import Tensor

import fastkd
from fastkd import _widen

IMPLEMENTATIONS = ("reference", "algebra", "native")
OWNERS = {"attention": IMPLEMENTATIONS, "nst": ("reference", "algebra")}
SIZES = [
    (3, 6, 4, (4, 5)),
    (2, 3, 9, (5, 5)),
    (2, 40, 3, (7,)),
    (1, 1, 1, (1, 1)),
    (2, 3, 2, (2, 3, 4)),
    (0, 3, 2, (2, 2)),
]


def maps(samples: int, channels: int, positions: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(samples, channels, *positions, generator=torch.Generator().manual_seed(seed))


def normalised(x: Tensor, dim: int) -> Tensor:
    """Where there is no length there is no gradient either."""
    length = x.detach().norm(dim=dim, keepdim=True)
    return torch.where(length > 1e-12, F.normalize(torch.where(length > 1e-12, x, 1), dim=dim), 0)


def naive_attention(student: Tensor, teacher: Tensor, p: float = 2.0, convention: str = "code") -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return normalised(x.abs().pow(p).mean(1).flatten(1), 1)

    difference = attention(student) - attention(teacher)
    if convention == "code":
        return difference.pow(2).sum() / max(1, difference.numel())
    return difference.norm(dim=1).sum() / max(1, len(difference))


def naive_nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Every channel against every other, by broadcasting."""
    s, t = normalised(student.flatten(2), 2), normalised(teacher.flatten(2), 2)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).sum() / max(1, len(a) * a.shape[1] * b.shape[1])

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each loss with the implementations that it has."""
    if "owner" in metafunc.fixturenames:
        native = {"native": [pytest.mark.native]}
        cases = [pytest.param((n, i), marks=native.get(i, ()), id=f"{n}-{i}") for n in OWNERS for i in OWNERS[n]]
        metafunc.parametrize("owner", cases)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "attention": (fastkd.attention_transfer_loss, naive_attention),
    "nst": (fastkd.nst_loss, naive_nst),
}


@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient(owner: tuple[str, str], size: tuple[int, int, int, tuple[int, ...]]) -> None:
    samples, channels, other, positions = size
    loss, naive = LOSSES[owner[0]]
    student, teacher = maps(samples, channels, positions), maps(samples, other, positions, 1)
    judge(loss, naive, student, teacher, impl=owner[1])
    if samples > 1:
        assert call(loss, student, teacher, impl=owner[1])[1].abs().max() > 1e-4


@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
def test_attention_conventions(impl: str, p: float, convention: str) -> None:
    student, teacher = maps(3, 5, (4, 6)), maps(3, 4, (4, 6), 1)
    options = {"p": p, "convention": convention}
    loss = fastkd.attention_transfer_loss
    judge(loss, lambda s, t: naive_attention(s, t, p, convention), student, teacher, impl=impl, **options)
    count = 3 if convention == "paper" else 3 * 24
    total = loss(student, teacher, reduction="sum", impl=impl, **options)
    torch.testing.assert_close(total, count * loss(student, teacher, impl=impl, **options))
    same = call(loss, student, student.clone(), impl=impl, **options)
    assert same[0] == 0
    assert (same[1] == 0).all()


ADVERSARIAL: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "zero maps": lambda: (torch.zeros(2, 3, 4, 4), maps(2, 3, (4, 4))),
    "teacher of zeros": lambda: (maps(2, 3, (4, 4)), torch.zeros(2, 5, 4, 4)),
    "zero channels": lambda: (maps(2, 3, (4, 4)) * torch.tensor([1.0, 0, 1]).view(3, 1, 1), maps(2, 3, (4, 4), 1)),
    "one sample of zeros": lambda: (
        maps(2, 3, (4, 4)) * torch.tensor([1.0, 0]).view(2, 1, 1, 1),
        maps(2, 3, (4, 4), 1),
    ),
    "tiny": lambda: (1e-6 * maps(2, 3, (4, 4)), maps(2, 3, (4, 4), 1)),
    "huge": lambda: (1e4 * maps(2, 3, (4, 4)), 1e4 * maps(2, 3, (4, 4), 1)),
    "constant": lambda: (torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4, 4)),
    "equal": lambda: (maps(2, 3, (4, 4)), maps(2, 3, (4, 4))),
    "no channels": lambda: (torch.zeros(2, 0, 4, 4), maps(2, 3, (4, 4))),
    "no positions": lambda: (torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4)),
}


@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_maps_that_can_fail(owner: tuple[str, str], problem: str) -> None:
    loss, naive = LOSSES[owner[0]]
    student, teacher = ADVERSARIAL[problem]()
    value, grad = call(loss, student, teacher, impl=owner[1])
    assert value.isfinite()
    assert grad.isfinite().all()
    if student.numel():
        judge(loss, naive, student, teacher, impl=owner[1])


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-8, 1e-20])
def test_bounded_gradient_of_small_maps(owner: tuple[str, str], size: float) -> None:
    value, grad = call(LOSSES[owner[0]][0], size * maps(2, 3, (4, 4)), maps(2, 3, (4, 4), 1), impl=owner[1])
    assert value.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().max() < (1e6 if owner[0] == "attention" else 1 / max(size, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(owner: tuple[str, str], dtype: torch.dtype) -> None:
    """A square of 1e3 is no number of float16."""
    loss, naive = LOSSES[owner[0]]
    for scale in (1, 1e3):
        student, teacher = (scale * maps(2, 5, (3, 7))).to(dtype), (scale * maps(2, 4, (3, 7), 1)).to(dtype)
        judge(loss, naive, student, teacher, impl=owner[1])
        judge(loss, naive, student, teacher.float(), impl=owner[1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("positions", [(2, 2), (6, 6)])
def test_gradcheck(name: str, positions: tuple[int, int]) -> None:
    student, teacher = maps(2, 4, positions).double().requires_grad_(), maps(2, 3, positions, 1).double()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name][0](s, teacher), (student,))


def test_layouts(owner: tuple[str, str]) -> None:
    loss, naive = LOSSES[owner[0]]
    student, teacher = maps(2, 6, (4, 5)), maps(2, 3, (4, 5), 1)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :, 1:, :-1],
    ):
        judge(loss, naive, layout(student), layout(teacher), impl=owner[1])
    judge(loss, naive, layout(student), teacher[:1, :, 1:, :-1].expand(2, 3, 3, 4), impl=owner[1])
    solid, other = maps(2, 5, (2, 3, 4)), maps(2, 4, (2, 3, 4), 1)
    judge(loss, naive, solid.to(memory_format=torch.channels_last_3d), other, impl=owner[1])


def test_different_positions(owner: tuple[str, str]) -> None:
    """The larger is averaged down, on either side, in each dimension."""
    loss, naive = LOSSES[owner[0]]

    def pooled(s: Tensor, t: Tensor) -> Tensor:
        size = [min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])]
        return naive(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))

    for one, two in (((8, 8), (4, 4)), ((4, 4), (7, 8)), ((8, 3), (4, 6))):
        judge(loss, pooled, maps(2, 5, one), maps(2, 4, two, 1), impl=owner[1])
        judge(loss, pooled, maps(2, 5, one).half(), maps(2, 4, two, 1).half(), impl=owner[1])
    line, other = maps(2, 5, (9,)), maps(2, 4, (3,), 1)
    judge(loss, lambda s, t: naive(F.adaptive_avg_pool1d(s, 3), t), line, other, impl=owner[1])


def test_not_a_number_is_not_hidden(owner: tuple[str, str]) -> None:
    for side in (0, 1):
        for bad in ("nan", "inf"):
            pair = [maps(3, 4, (3, 3)), maps(3, 4, (3, 3), 1)]
            pair[side][1, 2, 1, 1] = float(bad)
            assert not LOSSES[owner[0]][0](*pair, impl=owner[1]).isfinite()


def test_channels_that_respond_nearly_alike() -> None:
    """More positions than channels: of a difference of large sums float32 would leave nothing."""
    student = maps(2, 6, (16, 16)).double()
    teacher = student + 1e-5 * maps(2, 6, (16, 16), 1)
    exact = float(naive_nst(student.float().double(), teacher.float().double()))
    assert 0 < exact < 1e-10
    judge(fastkd.nst_loss, naive_nst, student.float(), teacher.float(), impl="algebra")
    assert float(fastkd.nst_loss(student.float(), teacher.float())) == pytest.approx(exact, rel=1e-2)


def test_the_smaller_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    for channels, positions in ((40, (3, 3)), (3, (20, 20))):
        with Largest() as largest:
            call(fastkd.nst_loss, maps(2, channels, positions), maps(2, channels, positions, 1))
        assert largest.numel == 2 * channels * positions[0] * positions[1]
    monkeypatch.setattr(_widen, "CHUNK", 500)
    judge(fastkd.nst_loss, naive_nst, maps(3, 3, (9, 9)), maps(3, 2, (9, 9), 1), impl="algebra")


@pytest.mark.native
def test_threads_do_not_change_the_sum() -> None:
    student, teacher = maps(9, 64, (8, 8)), maps(9, 32, (8, 8), 1)
    one = call(fastkd.attention_transfer_loss, student, teacher, impl="native")
    torch.set_num_threads(2)
    two = call(fastkd.attention_transfer_loss, student, teacher, impl="native")
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
