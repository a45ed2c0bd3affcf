"""Float layers that compute with the numbers their int8 forms will have: quantisation-aware training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._int8 import channel_scales
from .choosing import FLOAT_LAYERS, Configs, Filter, choose
from .configs import Config, Dynamic, Static, WeightOnly
from .straight_through import fake_quantize


def prepare_qat_(model: nn.Module, config: Configs | None = None, filter_fn: Filter | None = None) -> dict[str, str]:
    """Make layers compute with rounded weights and inputs, in float and with a gradient. Same as, in a linear layer::

        F.linear(fake_quantize(x, x_scale), fake_quantize(weight, weight_scale), bias)

    with the scales that :func:`quantize_` gives. Parameters, their names, optimizers, hooks and ties stay as they are;
    train as before, with :func:`fastkd.kd_loss` and the float model as teacher for example. ``quantize_`` then makes
    int8 layers of what was trained, which compute the numbers that training saw.

    Args:
        model: Changed in place. It may be in training mode.
        config, filter_fn: As in :func:`quantize_`. With :class:`Static`, run :func:`calibrate` before training, and
            again whenever the inputs have drifted; until then the layers give NaN.

    Returns:
        The layers that were left as they are, with reasons.

    Raises:
        TypeError: a wrong type.
        ValueError: no layer is left to prepare; a pattern that matches no name.

    Example:
        >>> from fastkd.int8 import quantize_
        >>> student = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> prepare_qat_(student)
        {}
        >>> student(torch.randn(2, 4)).sum().backward()
        >>> _ = quantize_(student.eval())
    """
    if not isinstance(model, nn.Module):
        _checks.bad_type("prepare_qat_", "model", "be a torch.nn.Module", type(model).__name__)
    chosen, left = choose("prepare_qat_", model, Dynamic() if config is None else config, filter_fn, FLOAT_LAYERS)
    if not chosen:
        _checks.bad_value("prepare_qat_", "model", "have a layer that may become int8", left or "none with weights")
    for choice in chosen:
        module: Any = choice.module
        module.__class__ = PREPARED[type(module)]
        module.config = choice.config
        static = isinstance(choice.config, Static) and not isinstance(module, nn.Embedding)
        scale = torch.full((), torch.nan, dtype=torch.float32, device=module.weight.device) if static else None
        module.register_buffer("input_scale", scale)
    return left


class FakeQuantizedLinear(nn.Linear):
    """:class:`torch.nn.Linear` with the numbers of :class:`Int8Linear`; made by :func:`prepare_qat_`."""

    config: Config
    input_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        rounded = _rounded_input(input, 1, self.config, self.input_scale)
        return F.linear(rounded, _by_slice(self.weight, 1), self.bias)


class FakeQuantizedConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` with the numbers of :class:`Int8Conv2d`; made by :func:`prepare_qat_`."""

    config: Config
    input_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        rounded = _rounded_input(input, 3, self.config, self.input_scale)
        output: Tensor = self._conv_forward(rounded, _by_slice(self.weight, 3), self.bias)
        return output


class FakeQuantizedEmbedding(nn.Embedding):
    """:class:`torch.nn.Embedding` with the numbers of :class:`Int8Embedding`; made by :func:`prepare_qat_`."""

    config: Config
    input_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return _by_slice(super().forward(input), 1)


def _rounded_input(input: Tensor, ndim: int, config: Config, scale: Tensor | None) -> Tensor:
    return input if isinstance(config, WeightOnly) else _by_slice(input, ndim, scale)


def _by_slice(values: Tensor, ndim: int, scale: Tensor | None = None) -> Tensor:
    """With one scale for each slice of so many dimensions, the last ones; its own, unless all have this one.

    A slice with an infinity is NaN in both cases, as int8 layers make of it.
    """
    shape = values.shape[: values.ndim - ndim]
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    scales = channel_scales(wide.reshape(shape.numel(), *values.shape[values.ndim - ndim :]))
    if scale is not None:
        scales = torch.where(scales.isnan(), scales, scale)
    return fake_quantize(values, scales.reshape(*shape, *[1] * ndim))


PREPARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Conv2d: FakeQuantizedConv2d,
    nn.Embedding: FakeQuantizedEmbedding,
}
