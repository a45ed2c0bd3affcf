"""int8 linear layers from float input to float output, beside those of other libraries, each with its error.

The float layer's weights are normal with standard deviation 0.02, as a trained layer's roughly are, and the input is
normal: float32, on a GPU bfloat16. An error is that of the whole output without the bias, relative to the float layer
in float64. The roof is as many products of the same instruction in registers alone, in the same rounds and on as many
threads; on a GPU torch's product of int8 matrices alone, and the bytes that nobody can do without.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.gate import Wrong
from bench.int8_rivals import ANYWHERE, ON_CUDA, RIVALS, Layer
from bench.measure import Case, Contender
from bench.providers import Unavailable, able, implementation
from fastkd import _dispatch, _int8_operators, native
from fastkd._int8 import quantize_channels
from fastkd.int8 import Int8Linear

PROVIDERS = (*RIVALS, "fastkd")
SHAPES = ("1,1024,1024", "8,1024,1024", "32,1024,1024", "128,1024,1024", "256,768,3072", "256,3072,768")
SHAPES += ("64,4096,4096", "512,4096,4096", "1,4096,4096")
CUDA_SHAPES = ("1,4096,4096", "16,4096,4096", "256,4096,4096", "4096,4096,4096")
SECONDS = 1e-2  # of calls, for a reading of the clock
RATE = 4e11  # operations a second and thread that a call is expected to reach; how many calls, hangs on it and no more
ERROR_BAR = 0.05


class Registers:
    """Operations in registers alone, as many as the layer has: what is left is that each product is made and added."""

    def __init__(self, work: int) -> None:
        self.work, self.threads = work, torch.get_num_threads()
        self.peak = native.extension().int8_peak
        self.rounds = max(1, round(work / (2 * self.peak(1, self.threads))))

    def __call__(self) -> tuple[Tensor, ...]:
        self.peak(self.rounds, self.threads)
        return ()


class Product:
    """torch's product of int8 matrices alone, of the layer's size."""

    def __init__(self, rows: int, terms: int, columns: int, device: torch.device) -> None:
        self.work = 2 * rows * terms * columns
        numbers = torch.randint(-127, 128, (rows + columns, terms), dtype=torch.int8, device=device)
        self.input, self.weight = numbers[:rows], numbers[rows:].t()

    def __call__(self) -> tuple[Tensor, ...]:
        return (torch._int_mm(self.input, self.weight),)


class Truth:
    """What the layer computes in float64, and what int8 numbers by the formula of fastkd/_int8.py make of it."""

    def __init__(self, layer: nn.Linear, input: Tensor) -> None:
        self.layer, self.input = layer, input
        self.weight, self.scale = quantize_channels(layer.weight)
        exact = input.double() @ layer.weight.detach().double().T
        steps = input.double().abs().amax(1, keepdim=True) / 127
        numbers = (input.double() / steps).round()
        quantised = (numbers @ self.weight.double().T) * self.scale.double() * steps
        self.exact, self.norm = exact, exact.norm()
        self.least = self.error((quantised + layer.bias.detach().double()).to(input.dtype))

    def error(self, output: Tensor) -> float:
        product = output.double() - self.layer.bias.detach().double()
        return float((product - self.exact).norm() / self.norm)

    def check(self, contender: Contender) -> None:
        error = contender.error or 0.0
        if contender.name == "fastkd" and abs(error - self.least) > 0.01 * self.least:
            raise Wrong(f"fastkd: the error is {error:.3g}, and that of its numbers {self.least:.3g}")
        if not error < ERROR_BAR:
            raise Wrong(f"{contender.name}: the error is {error:.3g}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", metavar="M,K,N", help="default: nine of them, on a GPU four")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


@torch.no_grad()
def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    on_cuda = device.type == "cuda"
    for shape in args.shape or (CUDA_SHAPES if on_cuda else SHAPES):
        rows, terms, columns = (int(number) for number in shape.split(","))
        torch.manual_seed(0)
        layer, input = nn.Linear(terms, columns), torch.randn(rows, terms)
        nn.init.normal_(layer.weight, std=0.02)
        input = input.to(device, torch.bfloat16 if on_cuda else torch.float32)
        truth = Truth(layer.requires_grad_(False).to(device), input)
        contenders, absent = able(args.providers, lambda name, of=truth: contender(name, of, args.impl), truth.check)
        labels = {"rows": rows, "terms": terms, "columns": columns}
        yield case_of(labels, contenders, absent, device)


def case_of(labels: dict[str, int], contenders: list[Contender], absent: dict[str, str], device: torch.device) -> Case:
    rows, terms, columns = labels.values()
    operations = 2 * rows * terms * columns
    if device.type == "cuda":
        product = Product(rows, terms, columns, device) if rows > 16 and terms % 8 == columns % 8 == 0 else None
        least_bytes = columns * (terms + 8) + 2 * rows * (terms + columns)
        named = {**labels, "dtype": "bfloat16"}
        return Case(named, contenders, absent=absent, matmul=product, least_bytes=least_bytes)
    calls = max(2, round(SECONDS / (operations / RATE / torch.get_num_threads() + 1e-5)))
    roof = None if native.missing() else Registers(operations)
    return Case(labels, contenders, absent=absent, matmul=roof, calls=calls)


def contender(name: str, truth: Truth, impl: str | None) -> Contender:
    device, elsewhere = truth.input.device.type, name in RIVALS and name not in ANYWHERE
    if elsewhere and (name in ON_CUDA) != (device == "cuda"):
        raise Unavailable(f"it is not measured on {device}")
    ran = implementation("int8_linear", impl, truth.input) if name == "fastkd" else ""
    run = _fastkd(truth, impl) if name == "fastkd" else RIVALS[name](truth.layer, truth.input)
    input = truth.input
    return Contender(name, lambda: (run(input),), impl=ran, error=truth.error(run(input)))


def _fastkd(truth: Truth, impl: str | None) -> Layer:
    """The module, as the others' are, which cannot be pinned."""
    weight, scale, bias = truth.weight, truth.scale, truth.layer.bias.detach()
    if impl is None:
        return Int8Linear(weight, scale, bias)
    return lambda x: _int8_operators.linear(x, weight, scale, bias, impl=impl)
