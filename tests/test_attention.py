"""Losses on attention scores: the reference against finite differences, everybody against what people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from attention_problems import LARGE, PLAIN, PROBLEMS, STORAGE, Problem, arrange, computed, expected, naive
from torch import Tensor

import fastkd
from fastkd import testing


@lru_cache
def answer(problem: Problem, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What is exact, and what float32 gets wrong of it."""
    options = problem.options()
    return testing.exact_and_error(lambda *tensors: expected(tensors, options), *problem.tensors(dtype))


def assert_exact(impl: str, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
    got = computed(impl, problem.tensors(dtype), problem.options())
    exact, error = answer(problem, dtype)
    assert len(got) == len(exact)
    for i, (one, want, bound) in enumerate(zip(got, exact, error, strict=True)):
        assert float(want.abs().max()) > 1e-3 or problem.keys == 1, "nothing to be wrong about"
        testing._check(i, one, want, bound, 256.0, 0.0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_gradcheck(name: str) -> None:
    problem = replace(PROBLEMS[name], queries=min(5, PROBLEMS[name].queries), keys=min(5, PROBLEMS[name].keys))
    student = problem.tensors(torch.float64)[: 1 if problem.same else 2]
    teacher = problem.tensors(torch.float64)[len(student) :]

    def loss(*student: Tensor) -> Tensor:
        tensors = arrange((*student, *teacher))
        return fastkd.attention_kl_loss(*tensors, **problem.options(), reduction="none", impl="reference")

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in student])


@pytest.mark.parametrize("name", [*PROBLEMS, *LARGE])
def test_reference_is_what_people_write(name: str) -> None:
    problem = (PROBLEMS | LARGE)[name]
    tensors = problem.tensors(torch.float64)
    for got, want in zip(
        computed("reference", tensors, problem.options()), expected(tensors, problem.options()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_is_good_enough_to_set_the_bar(name: str) -> None:
    """Off by less than 2^-16 of the largest number: a poor formula must not buy a loose bar.

    (Of the largest, because in a row of one dimension the sum over keys may be anything down to 0.)
    """
    for value, bound in zip(*answer(PROBLEMS[name], torch.float32), strict=True):
        assert float(bound.max()) <= 2**-16 * float(value.abs().max().clamp(min=1e-3))


@pytest.mark.few_interpreted(5)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact(impl: str, name: str, dtype: torch.dtype) -> None:
    assert_exact(impl, PROBLEMS[name], dtype)


@pytest.mark.parametrize("dtype", STORAGE[:2], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_exact_over_several_tiles(impl: str, name: str, dtype: torch.dtype) -> None:
    if impl == "triton" and not torch.cuda.is_available():
        pytest.skip("interpreted, tiles are small: the other problems have several")
    assert_exact(impl, LARGE[name], dtype)


def test_exact_at_a_diagonal_that_crosses_several_tiles(impl: str) -> None:
    """Keys that are seen whole, in part and not at all, of interpreted kernels too; so the next."""
    alone = replace(PLAIN, batch=1, heads=1, student_groups=1, teacher_groups=1)
    assert_exact(impl, replace(alone, queries=70, keys=70, causal=True))


def test_exact_with_fewer_heads_of_keys_than_the_teacher(impl: str) -> None:
    assert_exact(impl, replace(PROBLEMS["grouped otherwise"], queries=9, keys=9))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.native
def test_several_threads(threads: int) -> None:
    """Few heads in parts, whose keys' gradients are added up in one order."""
    torch.set_num_threads(threads)
    for problem in (LARGE["large causal masked"], replace(LARGE["large itself"], heads=1, queries=530, keys=530)):
        assert_exact("native", problem)
        first, second = (computed("native", problem.tensors(), problem.options()) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_mixed_dtypes(impl: str) -> None:
    """Student and teacher in storage of their own."""
    problem = replace(PLAIN, batch=1)
    for student, teacher in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        tensors = problem.tensors(student)[:2] + problem.tensors(teacher)[2:]
        got = computed(impl, tensors, {})
        exact, error = testing.exact_and_error(lambda *x: expected(x, {}), *tensors)
        for i in range(3):
            testing._check(i, got[i], exact[i], error[i], 256.0, 0.0)


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_reductions(impl: str, reduction: str) -> None:
    problem = replace(PLAIN, causal=True, masked=True)
    tensors, options = problem.tensors(), problem.options()
    losses, counts = naive(*(x.double() for x in tensors), **options)
    divisor = {"sum": 1, "mean": int(counts.sum()), "batchmean": problem.batch}[reduction]
    want = losses.sum() / divisor
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    tensors = tuple(x.to(device) for x in tensors)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    leaf = tensors[0].requires_grad_()
    got = fastkd.attention_kl_loss(leaf, *tensors[1:], **options, reduction=reduction, impl=impl)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(3 * got, leaf)
    rows = fastkd.attention_kl_loss(leaf, *tensors[1:], **options, reduction="none", impl=impl)
    (want_grad,) = torch.autograd.grad(rows.sum() * 3 / divisor, leaf)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-8)


def test_without_a_batch(impl: str) -> None:
    q_s, k_s, q_t, k_t = (x.to("cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
                          for x in replace(PLAIN, masked=True).tensors())  # fmt: skip
    mask = torch.arange(21, device=q_s.device) < 17
    options = {"key_mask": mask, "query_mask": mask, "impl": impl}
    for reduction, shape in (("none", (2, 21)), ("mean", ()), ("batchmean", ())):
        got = fastkd.attention_kl_loss(q_s[0], k_s[0], q_t[0], k_t[0], **options, reduction=reduction)
        batched = options | {"key_mask": mask[None], "query_mask": mask[None]}
        want = fastkd.attention_kl_loss(q_s[:1], k_s[:1], q_t[:1], k_t[:1], **batched, reduction=reduction)
        assert got.shape == shape
        assert torch.equal(got, want[0] if shape else want)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other dim": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "part of a larger tensor": lambda x: torch.cat([x + 1, x, x - 1], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "expanded batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "backwards": lambda x: x.flip(-1).contiguous().flip(-1).mT.contiguous().mT,
}


@pytest.mark.few_interpreted(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl: str, layout: str) -> None:
    """The same bits, whatever memory the tensors are in; queries' gradient is laid out as they are."""
    tensors = replace(PLAIN, causal=True).tensors()
    if layout == "expanded batch":
        tensors = tuple(x[:1].repeat(2, 1, 1, 1) for x in tensors)
    want = computed(impl, tensors, {"causal": True})
    got = computed(impl, tuple(LAYOUTS[layout](x) for x in tensors), {"causal": True})
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(impl: str, wanted: tuple[bool, bool]) -> None:
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q_s, k_s, q_t, k_t = (x.to(device) for x in PLAIN.tensors())
    both = [q_s.clone().requires_grad_(), k_s.clone().requires_grad_()]
    gradients = torch.autograd.grad(fastkd.attention_kl_loss(*both, q_t, k_t, impl=impl), both)
    some = [x.clone().requires_grad_(flag) for x, flag in zip((q_s, k_s), wanted, strict=True)]
    fastkd.attention_kl_loss(*some, q_t, k_t, impl=impl).backward()
    for x, flag, want in zip(some, wanted, gradients, strict=True):
        assert (x.grad is not None) == flag
        assert x.grad is None or torch.equal(x.grad, want)


def test_one_implementations_backward_takes_anothers_state(impl: str) -> None:
    from fastkd import _dispatch
    from fastkd.losses._attention_arguments import Scores

    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    tensors = tuple(x.to(device) for x in PROBLEMS["causal masked"].tensors())
    options = {"key_mask": None, "query_mask": None, "scale": None, "teacher_scale": None, "reduction": "sum"}
    rows = Scores("test", *tensors).rows(causal=True, **options)
    reference, mine = (_dispatch.pick("attention_kl_loss", name, tensors[0], ()) for name in ("reference", impl))
    loss, state, scale = reference.forward(rows)
    upstream = torch.ones((), device=device)
    got_loss, got_state, got_scale = mine.forward(rows)
    torch.testing.assert_close(got_state, state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
    assert float(got_scale) == float(scale) == 1
    want = reference.backward(rows, state, scale, upstream, (True, True))
    got = mine.backward(rows, state, scale, upstream, (True, True))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
