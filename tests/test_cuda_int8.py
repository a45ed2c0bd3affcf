"""The CUDA kernels of int8 layers, on the machine of tests/cuda_on_cpu: the bits of the formula."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import test_int8_linear as same
import torch
from cuda_emulation import MARKS, Machine
from int8_problems import ACTIVATIONS, DTYPES, assert_same_bits, flat, int8, linear, scales, weights
from test_cuda_pairs import run_failing
from torch import Tensor

from fastkd import _dispatch, _int8, native
from fastkd.native import _int8_cuda, int8_linear
from fastkd.native.logit import DTYPES as NUMBERS

pytestmark = MARKS
FEW, MANY = (1, 2, 3, 4, 5, 8, 9, 15, 16), (17, 63, 64, 65, 127, 128, 129)
TERMS = (1, 2, 3, 15, 16, 17, 33, 48, 63, 64, 65, 100, 127, 128, 192, 200)
COLUMNS = (1, 3, 4, 8, 15, 16, 17, 31, 64, 65, 100, 128, 132)


def layer(
    machine: Machine,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    step: float | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    processors: int = 4,
    gap: int = 0,
) -> Tensor:
    """As fastkd/native/_int8_cuda.py asks for it, of rows with a gap of NaN between them."""
    (rows, terms), columns = x.shape, len(w)
    output = torch.empty(rows, columns, dtype=x.dtype)
    scratch = torch.empty(machine.cuda_int8_linear_scratch(rows, terms, columns, processors), dtype=torch.uint8)
    between = [
        None if part is None else torch.nn.functional.pad(part, (0, gap), value=torch.nan) for part in (x, residual)
    ]
    given = [0 if part is None else part for part in (None if step is None else torch.tensor(step), bias, between[1])]
    sizes = (rows, terms, columns, terms + gap, NUMBERS[x.dtype])
    names = (columns + gap, output, _int8.ACTIVATIONS.index(activation))
    numbers = (between[0], *sizes, given[0], w, scale, *given[1:], *names)
    machine.call("cuda_int8_linear", numbers, processors, scratch, 0, outputs=[output, scratch])
    return output


@pytest.mark.parametrize("seed", range(60))
def test_any_shape_has_the_bits_of_the_formula(cuda_on_cpu: Machine, seed: int) -> None:
    dice = random.Random(seed)
    rows, terms, columns = dice.choice(FEW if seed % 2 else MANY), dice.choice(TERMS), dice.choice(COLUMNS)
    dtype, activation = dice.choice(DTYPES), dice.choice(["none", "relu"])
    x, w, scale = flat(rows, terms, dtype=dtype), weights(columns, terms, seed=seed), scales(columns, seed)
    bias = flat(columns, seed=1) if dice.random() < 0.7 else None
    residual = flat(rows, columns, seed=2, dtype=dtype) if dice.random() < 0.5 else None
    step = 0.021 if dice.random() < 0.4 else None
    processors, gap = dice.choice([1, 4, 132]), dice.choice([0, 1, 8])
    got = layer(cuda_on_cpu, x, w, scale, bias, step, residual, activation, processors, gap)
    assert_same_bits(got, ACTIVATIONS[activation](linear(x, w, scale, bias, step, residual)))


# rows, terms, columns, processors -> launches
PLANS = {
    (4, 70, 40, 4): 1,  # the block quantises, one pass
    (4, 4097, 16, 1): 1,  # in two chunks
    (5, 2049, 33, 4): 2,  # rows quantised before
    (16, 64, 16, 4): 2,
    (16, 8256, 16, 8): 3,  # long rows of few columns: in parts
    (2, 8256, 17, 8): 3,
    (17, 512, 64, 4): 3,
    (17, 511, 64, 4): 2,  # too short for two parts
    (65, 64, 65, 4): 2,
    (65, 320, 65, 4): 2,
    (129, 208, 129, 1): 2,  # large tiles
    (130, 192, 260, 4): 2,
    (130, 65, 260, 4): 2,  # those are for aligned rows
    (70, 4096, 5, 1): 2,  # more terms than there are stages
}


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_each_way_of_computing(cuda_on_cpu: Machine, plan: tuple[int, int, int, int]) -> None:
    """Which leaves no trace in the numbers; nor does the order of threads and blocks."""
    rows, terms, columns, processors = plan
    x, w, scale, bias = flat(rows, terms, dtype=torch.bfloat16), weights(columns, terms), scales(columns), flat(columns)
    want = linear(x, w, scale, bias)
    for seed in (0, 1):
        with cuda_on_cpu.order(seed):
            assert_same_bits(layer(cuda_on_cpu, x, w, scale, bias, processors=processors), want)
        assert cuda_on_cpu.launches() == PLANS[plan]


def test_groups_of_tiles(cuda_on_cpu: Machine) -> None:
    """More than go along the columns together."""
    x, w, scale = flat(600, 16), weights(130, 16), scales(130)
    assert_same_bits(layer(cuda_on_cpu, x, w, scale, processors=64), linear(x, w, scale, None))


@pytest.mark.parametrize(
    ("rows", "terms", "columns", "launches"), [(1, 1 << 17, 8, 1), (9, 1 << 17, 8, 2), (3, (1 << 17) + 2049, 16, 3)]
)
def test_sums_are_exact_however_long(cuda_on_cpu: Machine, rows: int, terms: int, columns: int, launches: int) -> None:
    """The largest that 32 bits hold, and more; what is left of two large parts, too."""
    x = torch.full((rows, terms), 127.0)
    w = torch.full((columns, terms), -128, dtype=torch.int8)
    w[1, terms // 2 :] = 127
    w[2] = weights(1, terms)[0]
    got = layer(cuda_on_cpu, x, w, torch.ones(columns), step=1.0, processors=1 if columns == 8 else 2)
    assert cuda_on_cpu.launches() == launches
    want = 127 * w.sum(1, dtype=torch.int64)
    assert int(want[0]) == -127 * 128 * terms
    assert_same_bits(got, want.expand(rows, columns).double().float())


def test_numbers_near_the_middle_of_two(cuda_on_cpu: Machine) -> None:
    """Where a product with 1 / step would round to another number than the quotient does."""
    step = 0.0217
    halves = (torch.arange(-127, 127) + 0.5) * step
    x = torch.stack([halves, halves.nextafter(torch.tensor(9.0)), halves.nextafter(torch.tensor(-9.0))])
    w = torch.eye(254, dtype=torch.int8)
    for rows in (3, 6):
        many = x.repeat(rows // 3, 1)
        got = layer(cuda_on_cpu, many, w, torch.ones(254), step=step)
        assert_same_bits(got, linear(many, w, torch.ones(254), None, step))
    product, quotient = (x * (1 / torch.tensor(step))).round(), (x / torch.tensor(step)).round()
    assert bool((product != quotient).any()), "these inputs tell the two apart"


@pytest.mark.parametrize("rows", [2, 7, 20])
def test_no_number_for_rows_without_a_step(cuda_on_cpu: Machine, rows: int) -> None:
    w, scale, bias = weights(20, 40), scales(20), flat(20)
    for step in (0.0, -1.0, torch.nan, torch.inf):
        assert layer(cuda_on_cpu, flat(rows, 40), w, scale, bias, step).isnan().all()
    x = torch.zeros(rows, 40)
    assert not layer(cuda_on_cpu, x, w, scale).signbit().any(), "of a row without a step every number is 0"
    x[0, 3] = 1e-45
    assert_same_bits(layer(cuda_on_cpu, x, w, scale, bias), bias.expand(rows, 20))


@pytest.fixture(params=[1, 4, 132])
def machine(cuda_on_cpu: Machine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Machine:
    """``impl="native"`` takes the CUDA kernels."""
    cuda_on_cpu.forget()
    monkeypatch.setattr(_int8_cuda, "_C", cuda_on_cpu)
    monkeypatch.setattr(_int8_cuda, "_on", lambda device: nullcontext(0))
    monkeypatch.setattr(_int8_cuda, "_processors", lambda device: request.param)
    monkeypatch.setattr(int8_linear, "forward", _int8_cuda.linear)
    return cuda_on_cpu


OTHERS = [
    *(partial(same.test_any_shape_has_the_bits_of_the_formula, seed=seed) for seed in range(4)),
    same.test_every_integer_of_a_small_sum_comes_out,
    same.test_a_half_is_rounded_to_even,
    *(partial(same.test_activations_are_as_exact_as_float32, activation=name, columns=1019) for name in ACTIVATIONS),
    *(partial(same.test_activations_of_the_extremes, activation=name) for name in ACTIVATIONS),
    *(partial(same.test_activations_join_the_rest, activation="gelu", dtype=dtype) for dtype in DTYPES),
    *(
        partial(same.test_a_row_that_is_not_finite_is_nan_and_harms_no_other, wrong=torch.inf, step=step)
        for step in (None, 0.5)
    ),
    partial(same.test_a_row_that_is_not_finite_is_nan_and_harms_no_other, wrong=torch.nan, step=None),
    *(partial(same.test_any_size_of_input, size=size) for size in (1e-37, 1e-20, 1e20, 3e38)),
    *(partial(same.test_leading_dimensions, shape=shape) for shape in ((40,), (0, 40), (2, 3, 40))),
    same.test_no_terms_and_no_columns,
    same.test_inputs_are_left_alone,
]


@pytest.mark.parametrize("test", OTHERS, ids=range(len(OTHERS)))
def test_what_is_asked_of_everyone(machine: Machine, test: Callable[..., None]) -> None:
    test("native")
    assert machine.reports() == []


def test_rows_that_begin_anywhere(machine: Machine) -> None:
    """In memory that is aligned to nothing but its numbers."""
    for rows, terms in ((2, 32), (9, 48), (20, 64), (20, 37)):
        table = weights(41, terms, seed=1).flatten()
        for first in range(1, 5):
            w = table[first : first + 40 * terms].view(40, terms)
            x = flat(rows * terms + 1, dtype=torch.bfloat16)[1:].view(rows, terms)
            assert_same_bits(int8.linear(x, w, scales(40), impl="native"), linear(x, w, scales(40), None))


def test_one_launch_that_fails_is_named_and_the_rest_is_left_out(cuda_on_cpu: Machine) -> None:
    for (rows, terms, columns, processors), launches in ((plan, PLANS[plan]) for plan in list(PLANS)[:7]):
        x, w, scale = flat(rows, terms), weights(columns, terms), scales(columns)
        compute = partial(layer, cuda_on_cpu, x, w, scale, processors=processors)
        for failing in range(1, launches + 1):
            with pytest.raises(
                RuntimeError, match=r"^fastkd: int8 linear: cudaErrorNoDevice \(as the test wants it\)$"
            ):
                run_failing(cuda_on_cpu, failing, compute)
            assert cuda_on_cpu.launches() == failing


def test_scratch_memory(cuda_on_cpu: Machine) -> None:
    bytes_of = partial(cuda_on_cpu.cuda_int8_linear_scratch)
    assert bytes_of(1, 4096, 4096, 132) == bytes_of(4, 1 << 17, 1 << 17, 132) == 0
    assert bytes_of(5, 100, 4096, 132) == 32 + 5 * 128
    assert bytes_of(8192, 4096, 4096, 132) == 8192 * (4 + 4096)
    # 16 small tiles: each for 16 processors, but no part of less than 256 terms
    assert bytes_of(64, 4096, 1024, 132) == 64 * (4 + 4096) + 16 * 64 * 1024 * 4
    assert bytes_of(64, 1024, 1022, 132) == 64 * (4 + 1024) + 4 * 64 * 1024 * 4
    # Numbers that 32 bits do not hold, and sums that need parts.
    assert bytes_of(1 << 20, 1 << 16, 1 << 16, 132) == (1 << 20) * (4 + (1 << 16))
    assert bytes_of(1 << 20, (1 << 17) + 1, 8, 132) == (1 << 20) * (4 + (1 << 17) + 64) + 2 * (1 << 20) * 8 * 4


@pytest.mark.parametrize(("architectures", "reason"), [("80,90,100,120", None), ("", "was built without CUDA")])
def test_who_may_take_them(architectures: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other layers stay with what torch has on a GPU, and say so."""
    extension = SimpleNamespace(
        cuda_architectures=architectures, cuda_device_count=lambda: 1, instruction_set=lambda: "x"
    )
    monkeypatch.setattr(native, "_extension", extension)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    for dtype in DTYPES:
        refusal = _dispatch._refusal("int8_linear", "native", device, (dtype,))
        assert refusal is None if reason is None else reason in refusal
    assert _dispatch._refusal("int8_linear", "native", device, (torch.float64,)) == "no kernel computes float64"
    for op in ("int8_conv2d", "int8_embedding", "int8_weight_only_linear"):
        on_cuda = "the tensors are on cuda, the C++ kernels run on the CPU"
        assert _dispatch._refusal(op, "native", device, (torch.float32,)) == on_cuda
        assert _dispatch._first(op, device, (torch.float32,)) == ("reference", None)
