"""int8 convolutions from float images to float images, beside torch's, each with its error.

The shapes are those of a ResNet and of a depthwise layer. A scale of the input is known beforehand for torch's static
layer and for ``fastkd-static``, and found image by image for ``fastkd``; torch's quantisation of the input and
dequantisation of the output are counted. Errors are relative to the float layer in float64, bias left out. The roof is
as many products as the taps have, of the same instruction in registers alone; Winograd's algorithm does with fewer.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gate import Wrong
from bench.int8 import ERROR_BAR, RATE, SECONDS, Registers
from bench.measure import Case, Contender
from bench.providers import Unavailable, able, implementation
from fastkd import _dispatch, _int8_operators, native
from fastkd._int8 import quantize_channels
from fastkd.int8 import Dynamic, Int8Conv2d, Static

PROVIDERS = ("eager", "eager-nchw", "bfloat16", "torch-static", "fastkd", "fastkd-static")
SHAPES = ("1,64,56,64,3,1,1", "8,64,56,256,1,1,1", "8,128,28,128,3,1,1", "8,256,28,512,1,2,1", "8,512,7,512,3,1,1")
SHAPES += ("8,3,224,64,7,2,1", "8,256,28,256,3,1,256")
Layer = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    """Images and their channels and side, output channels, and the kernel's side, its stride and its groups."""

    images: int
    channels: int
    side: int
    count: int
    kernel: int
    stride: int
    groups: int

    @property
    def window(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.kernel // 2, "groups": self.groups}

    @property
    def operations(self) -> int:
        across = (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return 2 * self.images * across**2 * self.count * self.channels // self.groups * self.kernel**2


class Truth:
    """A float layer, its int8 numbers, and what the layer computes in float64."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape, fan_in = shape, shape.channels // shape.groups * shape.kernel**2
        image = torch.randn(shape.images, shape.channels, shape.side, shape.side)
        self.image = image.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(shape.count, shape.channels // shape.groups, shape.kernel, shape.kernel) / fan_in**0.5
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), torch.randn(shape.count)
        self.numbers, self.scale = quantize_channels(weight)
        self.input_scale = self.image.abs().amax() / 127
        self.exact = F.conv2d(self.image.double(), weight.double(), **shape.window)
        self.least = {static: self.error(self._quantised(static)) for static in (False, True)}

    def _quantised(self, static: bool) -> Tensor:
        """What the int8 numbers of fastkd/_int8.py make of it, in float64."""
        amax = self.image.abs().amax((1, 2, 3), keepdim=True)
        steps = (self.image.abs().amax() if static else amax).double() / 127
        numbers = (self.image.double() / steps).round()
        products = F.conv2d(numbers, self.numbers.double(), **self.shape.window)
        return products * self.scale.double().reshape(-1, 1, 1) * steps + self.bias.double().reshape(-1, 1, 1)

    def error(self, output: Tensor) -> float:
        product = output.double() - self.bias.double().reshape(-1, 1, 1)
        return float((product - self.exact).norm() / self.exact.norm())

    def check(self, contender: Contender) -> None:
        error = contender.error or 0.0
        if contender.name.startswith("fastkd"):
            least = self.least[contender.name == "fastkd-static"]
            if abs(error - least) > 0.01 * least:
                raise Wrong(f"{contender.name}: the error is {error:.3g}, and that of its numbers {least:.3g}")
        if not error < ERROR_BAR:
            raise Wrong(f"{contender.name}: the error is {error:.3g}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "IMAGES,CHANNELS,SIDE,OUTPUTS,KERNEL,STRIDE,GROUPS"
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar=names, help="default: seven of them")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


@torch.no_grad()
def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    if device.type != "cpu":
        raise SystemExit("bench/run.py int8_conv: the layers are measured on the CPU, add --device cpu")
    for words in args.shape:
        shape = Shape(*(int(number) for number in words.split(",")))
        truth = Truth(shape)
        contenders, absent = able(args.providers, lambda name, of=truth: contender(name, of, args.impl), truth.check)
        calls = max(2, round(SECONDS / (shape.operations / RATE / torch.get_num_threads() + 1e-5)))
        roof = None if native.missing() else Registers(shape.operations)
        yield Case(shape._asdict(), contenders, absent=absent, matmul=roof, calls=calls)


def contender(name: str, truth: Truth, impl: str | None) -> Contender:
    ran = implementation("int8_conv2d", impl, truth.image) if name.startswith("fastkd") else ""
    image = truth.image.contiguous() if name == "eager-nchw" else truth.image
    run = LAYERS[name](truth, impl)
    return Contender(name, lambda: (run(image),), impl=ran, error=truth.error(run(image)))


def _eager(truth: Truth, _: str | None) -> Layer:
    return lambda x: F.conv2d(x, truth.weight, truth.bias, **truth.shape.window)


def _eager_nchw(truth: Truth, _: str | None) -> Layer:
    weight = truth.weight.contiguous()
    return lambda x: F.conv2d(x, weight, truth.bias, **truth.shape.window)


def _bfloat16(truth: Truth, _: str | None) -> Layer:
    weight, bias = truth.weight.bfloat16(), truth.bias.bfloat16()
    return lambda x: F.conv2d(x.bfloat16(), weight, bias, **truth.shape.window).float()


def _torch_static(truth: Truth, _: str | None) -> Layer:
    """uint8 inputs and outputs with scales that are known, int8 weights by channel.

    A depthwise layer adds products in 16 bits, which overflow unless the input has 7: the default of torch's observers.
    """
    if "x86" not in torch.backends.quantized.supported_engines:
        raise Unavailable("torch has no engine for quantised layers here")
    shape, window = truth.shape, truth.shape.window
    output = truth.exact + truth.bias.double().reshape(-1, 1, 1)
    low, high = min(0.0, float(output.min())), max(0.0, float(output.max()))
    step = (high - low) / 255
    zero = round(-low / step)
    levels = 127 if shape.groups == shape.channels else 255
    input_step = 2 * float(truth.image.abs().max()) / levels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        numbers = torch.quantize_per_channel(
            truth.weight, truth.scale.double(), torch.zeros(shape.count, dtype=torch.long), 0, torch.qint8
        )
    stride, padding = [window["stride"]] * 2, [window["padding"]] * 2
    packed = torch.ops.quantized.conv2d_prepack(numbers, truth.bias, stride, padding, [1, 1], shape.groups)

    def run(x: Tensor) -> Tensor:
        quantised = torch.quantize_per_tensor(x, input_step, (levels + 1) // 2, torch.quint8)
        return torch.ops.quantized.conv2d(quantised, packed, step, zero).dequantize()

    return run


def _fastkd(truth: Truth, impl: str | None, input_scale: Tensor | None = None) -> Layer:
    tensors, window = (truth.numbers, truth.scale, truth.bias), truth.shape.window
    if impl is not None:  # which a module cannot be pinned to
        return lambda x: _int8_operators.conv2d(x, *tensors, input_scale=input_scale, impl=impl, **window)
    layer = Int8Conv2d(*tensors, **window, config=Dynamic() if input_scale is None else Static())
    if input_scale is not None:
        layer.input_scale.copy_(input_scale)
    return layer


LAYERS: dict[str, Callable[[Truth, str | None], Layer]] = {
    "eager": _eager,
    "eager-nchw": _eager_nchw,
    "bfloat16": _bfloat16,
    "torch-static": _torch_static,
    "fastkd": _fastkd,
    "fastkd-static": lambda truth, impl: _fastkd(truth, impl, truth.input_scale),
}
