"""The CUDA kernels of pairs, on the machine of tests/cuda_on_cpu: against float64, and watched at every access."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cuda_emulation import MARKS, Machine
from feature_problems import flat
from pair_problems import ADVERSARIAL, naive_angle, naive_distance
from torch import Tensor

from fastkd._pairs import COINCIDENT
from fastkd.testing import exact_and_error

pytestmark = MARKS
EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)
NAIVE = {"angle": naive_angle, "distance": naive_distance}
F64 = torch.float64
each_kind = pytest.mark.parametrize("kind", NAIVE)


def squares(machine: Machine, x: Tensor, y: Tensor | None = None) -> Tensor:
    """As fastkd/native/_pairs_cuda.py asks for them, with NaN where nothing is read."""
    x, other = x.double(), None if y is None else y.double()
    centre = x.mean(0)
    x, other = x - centre, None if other is None else other - centre
    products = x @ (x if other is None else other).T
    if other is None:
        products[torch.ones_like(products).tril(-1).bool()] = torch.nan
    rows = (x, x.square().sum(1), len(x))
    others = rows if other is None else (other, other.square().sum(1), len(other))
    out = torch.empty(len(x), others[2], dtype=F64)
    machine.call("cuda_squared_distances", products, rows, others, x.shape[1], y is None, out, 0, outputs=[out])
    return out


def loss(
    machine: Machine, kind: str, student: Tensor, teacher: Tensor, delta: float = 1.0, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """The sum and its slopes, from squared distances. Anchors come in as many slabs as there can be."""
    n = len(student)
    total, slopes = torch.empty((), dtype=F64), torch.empty(n, n, dtype=F64)
    more = (0,) if kind == "angle" else ()
    bytes_ = machine.cuda_angle_loss_scratch(n, gradient, 0) if more else machine.cuda_distance_loss_scratch(n)
    scratch = torch.empty(bytes_, dtype=torch.uint8)
    where = (student, teacher, student.sum(), teacher.sum())
    arguments = (where, n, COINCIDENT, delta, total, slopes if gradient else 0, *more, scratch, 0)
    machine.call(f"cuda_{kind}_loss", *arguments, outputs=[total, slopes, scratch])
    return total, slopes


def pull(machine: Machine, weights: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    x, y = x.double(), x.double() if y is None else y.double()
    out = torch.empty_like(x)
    machine.call("cuda_pull", weights, x, len(x), y, len(y), x.shape[1], out, 0, outputs=[out])
    return out


def formula(naive: Callable[..., Tensor], delta: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def compute(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        value = naive(leaf, teacher, delta=delta, reduction="sum")
        (grad,) = torch.autograd.grad(value, leaf)
        return value.detach().reshape(1), grad

    return compute


def judge(machine: Machine, kind: str, student: Tensor, teacher: Tensor, delta: float = 1.0) -> None:
    """The bar of fastkd.testing, without a last rounding to float32; and the same sum where no slopes are wanted."""
    pair = squares(machine, student), squares(machine, teacher)
    total, slopes = loss(machine, kind, *pair, delta)
    exact, error = exact_and_error(formula(NAIVE[kind], delta), student, teacher)
    for got, want, bound in zip((total.reshape(1), 2 * pull(machine, slopes, student)), exact, error, strict=True):
        allowed = 2**-24 * want.abs() + 256 * bound.reshape(-1, *[1] * (want.ndim - 1)) + 1e-45
        assert bool(((got - want).abs() <= allowed).all()), float(((got - want).abs() / allowed).max())
    assert torch.equal(slopes, slopes.T)
    assert bool((slopes.diagonal() == 0).all())
    alone, untouched = loss(machine, kind, *pair, delta, gradient=False)
    assert float((alone - total).abs()) <= 1e-15 * float(total)
    assert bool(untouched.isnan().all())


@each_kind
@pytest.mark.parametrize("n", EDGES)
def test_edges_of_tiles(cuda_on_cpu: Machine, kind: str, n: int) -> None:
    judge(cuda_on_cpu, kind, flat(n, 7), flat(n, 5, 1))


@each_kind
@pytest.mark.parametrize("problem", [name for name in ADVERSARIAL if name != "no rows"])
def test_adversarial(cuda_on_cpu: Machine, kind: str, problem: str) -> None:
    judge(cuda_on_cpu, kind, *ADVERSARIAL[problem]())


@each_kind
def test_close_rows_far_apart_in_the_batch(cuda_on_cpu: Machine, kind: str) -> None:
    """In tiles of their own, and among rows that are not close to any: those keep all their digits."""
    student, teacher = flat(70, 6), flat(70, 5, 1)
    student[3] = student[66] = flat(1, 6, 2)[0].bfloat16()
    student[66, 2] += 2.0**-14
    judge(cuda_on_cpu, kind, student, teacher)


@each_kind
@pytest.mark.parametrize("scale", [2.0**-300, 2.0**300])
def test_scale_changes_no_bit(cuda_on_cpu: Machine, kind: str, scale: float) -> None:
    """Squared distances that float32 has no numbers for."""
    pair = [squares(cuda_on_cpu, flat(35, 4)), squares(cuda_on_cpu, flat(35, 5, 1))]
    total, slopes = loss(cuda_on_cpu, kind, *pair)
    scaled, other = loss(cuda_on_cpu, kind, pair[0] * scale, pair[1] / scale)
    assert torch.equal(scaled, total)
    assert torch.equal(other * scale, slopes)


@each_kind
def test_delta(cuda_on_cpu: Machine, kind: str) -> None:
    judge(cuda_on_cpu, kind, flat(20, 4), flat(20, 5, 1), delta=0.1)


@each_kind
def test_the_order_of_threads_and_blocks_changes_nothing(cuda_on_cpu: Machine, kind: str) -> None:
    student, teacher = flat(50, 6), flat(50, 5, 1)
    student[40] = student[2] + 1e-5
    results = []
    for seed in (0, 1, 2):
        with cuda_on_cpu.order(seed):
            pair = squares(cuda_on_cpu, student), squares(cuda_on_cpu, teacher)
            results.append((*pair, *loss(cuda_on_cpu, kind, *pair)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_gives_nan(cuda_on_cpu: Machine, kind: str, value: float) -> None:
    good = squares(cuda_on_cpu, flat(6, 3))
    for side in (0, 1):
        pair = [good, good.clone()]
        pair[side][2], pair[side][:, 2], pair[side][2, 2] = value, value, 0
        assert loss(cuda_on_cpu, kind, *pair)[0].isnan()


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (31, 33, 5), (32, 64, 40), (65, 3, 100), (3, 4, 0)])
def test_squared_distances(cuda_on_cpu: Machine, n: int, m: int, d: int) -> None:
    """However small, they are those of the differences; far from the origin, too."""
    x, y = flat(n, d).double(), flat(m, d, 1).double()
    y[:, :1] = x[0, :1]
    y[-1] = x[-1]
    y[-1, -1:] += 1e-7
    for offset in (0.0, 64.0):
        exact = (x[:, None] - y).square().sum(-1)
        torch.testing.assert_close(squares(cuda_on_cpu, x + offset, y + offset), exact, rtol=1e-6, atol=0)
    if n > 1:
        x[-1] = x[0] + 3e-5 * flat(1, d, 2)[0]  # of the product 1e-6 would be left
    exact = (x[:, None] - x).square().sum(-1)
    got = squares(cuda_on_cpu, x)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=0)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 9, 127), (8, 128, 128), (9, 129, 129), (33, 300, 3)])
def test_pull(cuda_on_cpu: Machine, n: int, m: int, d: int) -> None:
    """The difference of close rows has all its digits, far from the origin, and whatever its weight."""
    x, y, weights = flat(n, d).double() + 1e4, flat(m, d, 1).double() + 1e4, flat(n, m, 2).double()
    y[-1] = x[-1] + 2.0**-38
    weights[-1, -1] = 1e11 / 3
    exact = (weights[..., None] * (x[:, None] - y)).sum(1)
    torch.testing.assert_close(pull(cuda_on_cpu, weights, x, y), exact, rtol=1e-12, atol=1e-12 * d * m)


def test_equal_rows_are_at_distance_0(cuda_on_cpu: Machine) -> None:
    x = flat(40, 9)
    x[33] = x[4]
    assert squares(cuda_on_cpu, x)[33, 4] == 0
    assert bool((squares(cuda_on_cpu, x, x.flip(0)).flip(1).diagonal() == 0).all())


def test_one_launch_that_fails_is_named_and_the_rest_is_left_out(cuda_on_cpu: Machine) -> None:
    for kind, launches in (("angle", 6), ("distance", 3)):
        for failing in range(1, launches + 1):
            pair = (torch.ones(3, 3, dtype=F64),) * 2
            with pytest.raises(
                RuntimeError, match=rf"^fastkd: {kind} loss: cudaErrorNoDevice \(as the test wants it\)$"
            ):
                run_failing(cuda_on_cpu, failing, partial(loss, cuda_on_cpu, kind, *pair))
            assert cuda_on_cpu.launches() == failing
        run_failing(cuda_on_cpu, launches + 1, partial(loss, cuda_on_cpu, kind, *pair))


def run_failing(machine: Machine, launch: int, call: Callable[[], Any]) -> None:
    machine.fail_at(launch)
    try:
        call()
    finally:
        machine.fail_at(-1)
