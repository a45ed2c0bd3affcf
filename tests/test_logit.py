"""Every implementation of the logit losses against the float64 oracle: values, gradients, options, storage, shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from logit_problems import BETA_TAKERS, DIVERGENCES, OPTIONS, STORAGE, Problem, answer, evaluate, has
from torch import Tensor

from fastkd import testing


def check(impl: str, problem: Problem) -> None:
    exact, error, slack = answer(problem)
    got = evaluate(impl, *problem.tensors(), upstream=problem.upstream(), **problem.options())
    for i, (one, want, bound) in enumerate(zip(got, exact, error, strict=True)):
        testing._check(i, one, want, bound, 256.0, slack[i])
    assert float(exact[1].abs().max()) > 1e-4, "the expected gradient is next to nothing: the test could not fail"


@pytest.mark.parametrize("logits", ["peaked", "flat"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_exact(impl: str, divergence: str, option: str, dtype: torch.dtype, logits: str) -> None:
    if not has(divergence, option):
        pytest.skip("takes no such option")
    if impl == "triton" and not torch.cuda.is_available():
        # Interpreted kernels are slow: each divergence meets each option once, with storage and logits taking turns.
        turn = DIVERGENCES.index(divergence) + list(OPTIONS).index(option)
        if (dtype, logits) != (STORAGE[turn % 3], ("peaked", "flat")[turn // 3 % 2]):
            pytest.skip("interpreted: storage and logits take turns")
        check(impl, Problem(divergence, dtype, logits, rows=3, vocabulary=97, option=option))
        return
    check(impl, Problem(divergence, dtype, logits, option=option))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [
        (1, 300),  # one row: a mean over rows hides nothing
        (3, 2),  # the smallest softmax
        (3, 1),  # every probability is 1
        (2, 1009),  # prime: no vector width divides it
        (2, 2047),  # around the edges of a tile
        (2, 2048),
        (2, 2049),
        (2, 4113),  # two tiles and a vector and one
        (65, 17),  # more rows than a chunk of threads
    ],
)
def test_shapes(impl: str, divergence: str, rows: int, vocabulary: int) -> None:
    if impl == "triton" and not torch.cuda.is_available() and rows * vocabulary > 500:
        pytest.skip("interpreted: small vocabularies")
    problem = Problem(divergence, torch.bfloat16, "peaked", rows, vocabulary, "temperature_2")
    if vocabulary == 1:
        exact, error, slack = answer(problem)
        got = evaluate(impl, *problem.tensors(), upstream=problem.upstream(), **problem.options())
        for i, one in enumerate(got):
            testing._check(i, one, exact[i], error[i], 256.0, slack[i])
    else:
        check(impl, problem)


@pytest.mark.parametrize("option", ["temperature_2", "hard", "hard_only", "a_third_shared"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_maxima_that_rise_from_tile_to_tile(impl: str, divergence: str, option: str) -> None:
    """What was summed so far has to move with them, in the soft term, in the hard one and beyond the shared ids."""
    if impl == "triton" and not torch.cuda.is_available():
        check(impl, Problem(divergence, torch.float32, "rising", 2, 150, option))
    else:
        check(impl, Problem(divergence, torch.float32, "rising", 2, 6200, option))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_every_peakedness(impl: str, divergence: str) -> None:
    """From flat to certain: where 1 - q of the best id nears the rounding of q, its gradient is a small difference."""
    n = 60 if impl != "triton" or torch.cuda.is_available() else 5
    student, teacher = testing.flat_logits(n, 97, seed=1), testing.flat_logits(n, 97, seed=2)
    student[:, 5] += torch.linspace(0, 30, n)
    teacher[:, 5] += torch.linspace(10, 20, n)

    def rows(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda s, t: evaluate(impl, s, t, upstream=torch.ones(n), divergence=divergence)

    testing.assert_as_exact_as_fp32(rows(impl)(student, teacher), rows("reference"), student, teacher)


@pytest.mark.parametrize("beta", [1e-8, 1e-4, 0.99, 0.9999])
@pytest.mark.parametrize("divergence", BETA_TAKERS)
def test_beta_near_its_ends(impl: str, divergence: str, beta: float) -> None:
    if impl == "triton" and beta > 0.99 and divergence != "jsd":
        pytest.skip("the GPU's fast logarithm loses digits of m / p near 1: within 40 times the bar")
    student, teacher = testing.peaked_logits(3, 97, seed=1), testing.peaked_logits(3, 97, seed=2)

    def rows(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda s, t: evaluate(impl, s, t, upstream=torch.ones(3), divergence=divergence, beta=beta)

    testing.assert_as_exact_as_fp32(rows(impl)(student, teacher), rows("reference"), student, teacher)


@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_label_smoothing_far_from_zero(impl: str, offset: float) -> None:
    """The mean of all logits is wanted relative to the largest: their sum alone has no digits left."""
    student, target = (testing.flat_logits(3, 97) + offset), torch.tensor([0, 5, 96])

    def rows(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
        options = {"target": target, "alpha": 1.0, "label_smoothing": 0.5}
        return lambda s: evaluate(impl, s, s, upstream=torch.ones(3), **options)

    testing.assert_as_exact_as_fp32(rows(impl)(student), rows("reference"), student)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_largest_vocabulary(impl: str, divergence: str) -> None:
    """Flat logits: where a few ids have all the mass, an error in a long tail goes unseen."""
    if impl == "reference" or (impl == "triton" and not torch.cuda.is_available()):
        pytest.skip("for compiled kernels")
    check(impl, Problem(divergence, torch.bfloat16, "flat", 1, 262144, "temperature_2"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_teacher_of_another_dtype(impl: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(impl, Problem(divergence, dtypes[0], option="hard", teacher_dtypes=dtypes[1:]))


def test_every_storage_at_once(impl: str) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    check(impl, Problem("jsd", torch.float16, option="two_teachers", teacher_dtypes=dtypes))


LAYOUTS = {
    "leading_dimensions": lambda x: x.reshape(2, 3, -1),
    "slice_of_a_wider_tensor": lambda x: torch.cat([x.new_full((6, 5), 50.0), x, x.new_full((6, 6), 50.0)], 1)[:, 5:-6],
    "every_other_row": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "last_stride_2": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl: str, layout: str) -> None:
    """Any layout gives what contiguous rows give: on the CPU the bits, on a GPU tiles begin where alignment is."""
    arrange = LAYOUTS[layout]
    plain_student, plain_teacher = testing.peaked_logits(6, 129), testing.peaked_logits(6, 129, seed=1)
    student, teacher = arrange(plain_student), arrange(plain_teacher)
    upstream = torch.linspace(0.5, 1.5, 6).reshape(student.shape[:-1])
    loss, grad = evaluate(impl, student.detach(), teacher, upstream=upstream, temperature=2.0)
    want_loss, want_grad = evaluate(impl, plain_student, plain_teacher, upstream=upstream.reshape(6), temperature=2.0)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if impl == "triton" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss.reshape(6), want_loss, **tolerance)
    torch.testing.assert_close(grad.reshape(6, -1), want_grad, **tolerance)


ROW_LAYOUTS = {
    "every_other": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "expanded": lambda x: x[:1].expand(6),
    "another_dtype": lambda x: x.int() if x.dtype is torch.int64 else x.double(),
}


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_layouts_of_rows(impl: str, layout: str) -> None:
    """Labels and numbers of any layout, and an incoming gradient with a stride."""
    arrange = ROW_LAYOUTS[layout]
    student, teacher = testing.peaked_logits(6, 33), testing.peaked_logits(6, 33, seed=1)
    target, number = arrange(torch.tensor([5, 0, 32, -100, 7, 3])), arrange(torch.linspace(0.5, 1, 6))
    upstream = torch.stack([torch.linspace(0.5, 1.5, 6), torch.zeros(6)], 1)[:, 0]
    names = ("row_weight", "temperature", "teacher_temperature", "alpha")
    got = evaluate(impl, student, teacher, upstream=upstream, target=target, **dict.fromkeys(names, number))
    target, number = target.long().contiguous(), number.float().contiguous()
    want = evaluate(impl, student, teacher, upstream=upstream.clone(), target=target, **dict.fromkeys(names, number))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_maps(impl: str) -> None:
    """dim=1: (N, C, H, W) logits with (N, H, W) labels, weights and losses, as in F.cross_entropy."""
    student, teacher = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    target = torch.randint(7, (2, 3, 4)).masked_fill(torch.rand(2, 3, 4) < 0.2, -100)
    weight = torch.rand(2, 3, 4)

    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(-1, 7)

    options = {"temperature": 2.0, "divergence": "jsd"}
    upstream = torch.rand(2, 3, 4)
    loss, grad = evaluate(impl, student, teacher, upstream=upstream, target=target, row_weight=weight, dim=1, **options)
    want_loss, want_grad = evaluate(
        impl,
        rows(student),
        rows(teacher),
        upstream=upstream.reshape(-1),
        target=target.reshape(-1),
        row_weight=weight.reshape(-1),
        **options,
    )
    assert torch.equal(loss.reshape(-1), want_loss)
    assert torch.equal(rows(grad), want_grad)


def test_channels_last_maps_are_not_copied(impl: str) -> None:
    student, teacher = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    last = student.to(memory_format=torch.channels_last)
    upstream = torch.rand(2, 3, 4)
    loss, grad = evaluate(impl, last, teacher, upstream=upstream, dim=1)
    want_loss, want_grad = evaluate(impl, student, teacher, upstream=upstream, dim=1)
    assert torch.equal(loss, want_loss)
    assert torch.equal(grad, want_grad)
    assert grad.is_contiguous(memory_format=torch.channels_last)
