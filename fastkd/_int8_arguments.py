"""Checks of what the int8 layers are called with, and the wording of their messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import bad_type, bad_value, choice, floats
from ._int8 import ACTIVATIONS, Window

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def no_transform(op: str, input: Any) -> None:
    """An error under ``torch.func``, whose tensors have no memory, and for a derivative that would be dropped."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{op}: int8 layers do not run inside vmap, grad, jvp and the like: call them before these")
    inside = forward_ad._current_level >= 0 and isinstance(input, Tensor)
    if inside and forward_ad.unpack_dual(input).tangent is not None:
        raise RuntimeError(f"{op}: there is no gradient through int8 layers, in forward mode either")


def weight(op: str, value: Any, ndim: int) -> None:
    if not isinstance(value, Tensor):
        bad_type(op, "weight", "be a tensor", type(value).__name__)
    if value.dtype is not torch.int8:
        bad_type(op, "weight", "be int8", value.dtype)
    if value.layout is not torch.strided:
        bad_type(op, "weight", "be a dense (strided) tensor", value.layout)
    if value.ndim != ndim:
        bad_value(op, "weight", f"have {ndim} dimensions", f"shape {tuple(value.shape)}")


def by_channel(op: str, argument: str, value: Any, of: Tensor, dtype: torch.dtype) -> Tensor:
    floats(op, argument, value)
    if value.ndim != 1 or value.shape[0] != of.shape[0]:
        bad_value(op, argument, f"have one number for each of {of.shape[0]} channels", f"shape {tuple(value.shape)}")
    on_device(op, argument, value, of)
    numbers: Tensor = value if value.dtype is dtype else value.to(dtype)
    # Asking takes a fraction of the time that a call which changes nothing takes. What is compiled cannot ask.
    if torch.compiler.is_compiling() or numbers.is_neg() or not numbers.is_contiguous():
        numbers = numbers.contiguous().resolve_neg()
    return numbers


def input_scale(op: str, value: Any, of: Tensor, dtype: torch.dtype) -> Tensor:
    floats(op, "input_scale", value, "a tensor of one number, or None")
    if value.numel() != 1:
        bad_value(op, "input_scale", "be one number", f"shape {tuple(value.shape)}")
    on_device(op, "input_scale", value, of)
    number: Tensor = value.to(dtype).reshape(())
    return number.resolve_neg()


def bad_step(op: str, value: float | None) -> NoReturn:
    """An ``input_scale`` that cannot divide. NaN is what a layer has that was never calibrated."""
    rule = "be positive and finite"
    if value is not None and math.isnan(value):
        rule += " (a layer with Static() gets its own in `with calibrate(model):`)"
    bad_value(op, "input_scale", rule, value)


def residual(op: str, value: Any, input: Tensor, shape: Sequence[int]) -> None:
    floats(op, "residual", value)
    if value.shape != tuple(shape):
        bad_value(op, "residual", f"have the shape of the output, {tuple(shape)}", tuple(value.shape))
    if value.dtype is not input.dtype:
        bad_type(op, "residual", f"have the input's dtype, {input.dtype}", value.dtype)
    on_device(op, "residual", value, input)


def on_device(op: str, argument: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        bad_value(op, argument, f"be on the input's device, {input.device}", value.device)


def rows(op: str, input: Any, of: Tensor) -> None:
    floats(op, "input", input)
    if input.ndim == 0 or input.shape[-1] != of.shape[1]:
        bad_value(op, "input", f"end in a dimension of {of.shape[1]}, the weight's", f"shape {tuple(input.shape)}")
    on_device(op, "weight", of, input)


def images(op: str, input: Any, of: Tensor, window: Window) -> None:
    floats(op, "input", input)
    if input.ndim not in (3, 4):
        bad_value(op, "input", "have the shape (N, C, H, W) or (C, H, W)", f"shape {tuple(input.shape)}")
    channels = of.shape[1] * window.groups
    if input.shape[-3] != channels:
        bad_value(op, "input", f"have {channels} channels, the weight's", f"shape {tuple(input.shape)}")
    on_device(op, "weight", of, input)
    size, kernel = (input.shape[-2], input.shape[-1]), (of.shape[2], of.shape[3])
    if min(window.output_size(size, kernel)) < 1:
        bad_value(op, "input", f"be, with its padding, as large as the kernel {kernel}", f"shape {tuple(input.shape)}")


def window(op: str, of: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any) -> Window:
    if isinstance(groups, bool) or not isinstance(groups, int):
        bad_type(op, "groups", "be an integer", type(groups).__name__)
    if groups < 1 or of.shape[0] % groups:
        bad_value(op, "groups", f"divide the weight's {of.shape[0]} channels", groups)
    if 0 in of.shape[1:]:
        bad_value(op, "weight", "have at least one tap", f"shape {tuple(of.shape)}")
    pairs = (pair(op, "stride", stride, 1), pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1))
    return Window(*pairs, groups)


def pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    got = (value, value) if isinstance(value, int) else value
    if type(got) is tuple and len(got) == 2 and type(got[0]) is type(got[1]) is int and min(got) >= least:
        return got  # nearly always: what follows would take longer
    if not isinstance(got, (tuple, list)) or any(isinstance(x, bool) or not isinstance(x, int) for x in got):
        bad_type(op, argument, "be an integer or a pair of them", repr(value))
    if len(got) != 2 or min(got) < least:
        bad_value(op, argument, f"be {least} or more in both directions", repr(value))
    return got[0], got[1]


def activation(op: str, value: Any) -> None:
    choice(op, "activation", value, ACTIVATIONS)


def ids(op: str, input: Any, of: Tensor, dtype: Any) -> None:
    if not isinstance(input, Tensor):
        bad_type(op, "input", "be a tensor of ids", type(input).__name__)
    if input.dtype not in IDS:
        bad_type(op, "input", "hold integer ids", input.dtype)
    if dtype not in DTYPES:
        bad_type(op, "dtype", "be float16, bfloat16, float32 or float64", dtype)
    on_device(op, "weight", of, input)
