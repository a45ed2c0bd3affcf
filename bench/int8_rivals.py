"""int8 linear layers of other libraries, made from a float layer: the best that each has."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.providers import Unavailable, need
from fastkd._int8 import quantize_channels

Layer = Callable[[Tensor], Tensor]


def float32(layer: nn.Linear, _: Tensor) -> Layer:
    return lambda x: layer(x.float()).to(x.dtype)


def bfloat16(layer: nn.Linear, input: Tensor) -> Layer:
    half = copy.deepcopy(layer).bfloat16()
    return lambda x: half(x.bfloat16()).to(x.dtype)


def torch_dynamic(layer: nn.Linear, _: Tensor) -> Layer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {nn.Linear})


def torchao(layer: nn.Linear, _: Tensor) -> Layer:
    need("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(copy.deepcopy(layer))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_compiled(layer: nn.Linear, input: Tensor) -> Layer:
    """With its weights frozen, which folds what it would otherwise compute of them in each call."""
    torch._dynamo.reset()
    model = torchao(layer, input)
    compiled = torch.compile(model, options={"freezing": True})
    compiled(input)
    return compiled


def quanto(layer: nn.Linear, input: Tensor) -> Layer:
    """Its activations have a scale of the whole tensor, found on this very input."""
    need("optimum.quanto")
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        model(input)
    freeze(model)
    return model


def bitsandbytes(layer: nn.Linear, _: Tensor) -> Layer:
    need("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    model = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, threshold=0.0)
    model.load_state_dict(layer.state_dict())
    return model.to("cpu")


def int_mm(layer: nn.Linear, input: Tensor) -> Layer:
    """torch's product of int8 matrices, and what has to be around it."""
    weight, scale = quantize_channels(layer.weight)
    bias = layer.bias.detach()

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        steps = wide.abs().amax(1, keepdim=True) / 127
        sums = torch._int_mm((wide / steps).round().to(torch.int8), weight.t())
        return (sums * scale * steps + bias).to(x.dtype)

    try:
        run(input)
    except RuntimeError as error:  # fewer than 17 rows, or sizes that are no multiples of 8
        raise Unavailable(str(error).split("\n")[0]) from error
    return run


def int_mm_compiled(layer: nn.Linear, input: Tensor) -> Layer:
    torch._dynamo.reset()
    compiled = torch.compile(int_mm(layer, input), dynamic=False)
    compiled(input)
    return compiled


RIVALS: dict[str, Callable[[nn.Linear, Tensor], Layer]] = {
    "eager": float32,
    "bfloat16": bfloat16,
    "torch-dynamic": torch_dynamic,
    "torchao": torchao,
    "torchao-compiled": torchao_compiled,
    "quanto": quanto,
    "bitsandbytes": bitsandbytes,
    "int-mm": int_mm,
    "int-mm-compiled": int_mm_compiled,
}


ANYWHERE = ("eager", "bfloat16")
ON_CUDA = (*ANYWHERE, "int-mm", "int-mm-compiled")  # the others are measured on the CPU
