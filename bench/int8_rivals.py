"""int8 linear layers of other libraries, made from a float layer: the best that each has for a CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.providers import need

Layer = Callable[[Tensor], Tensor]


def float32(layer: nn.Linear, _: Tensor) -> Layer:
    return layer


def bfloat16(layer: nn.Linear, input: Tensor) -> Layer:
    half = copy.deepcopy(layer).bfloat16()
    return lambda x: half(x.bfloat16()).float()


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


RIVALS: dict[str, Callable[[nn.Linear, Tensor], Layer]] = {
    "eager": float32,
    "bfloat16": bfloat16,
    "torch-dynamic": torch_dynamic,
    "torchao": torchao,
    "torchao-compiled": torchao_compiled,
    "quanto": quanto,
    "bitsandbytes": bitsandbytes,
}
