"""``torch.nn.Conv2d`` with int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, _int8_arguments
from .._int8_operators import conv2d
from .configs import Config, Dynamic, WeightOnly
from .layer import Int8Layer, float32, rounded, with_parameters

Pair = tuple[int, int]
ACTIVATED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
MODES = ("zeros", "reflect", "replicate", "circular")


class Int8Conv2d(Int8Layer):
    """A convolution whose weights, and unless the config is :class:`WeightOnly` inputs too, are int8. Same as::

        F.conv2d(rounded(x), weight * scale[:, None, None, None], bias, stride, padding, dilation, groups)

    with ``rounded(x)`` to 127 steps on each side of zero, image by image or, with :class:`Static`, all alike.
    Inference only: a backward through it raises; with :class:`WeightOnly`, which torch computes, the input gets one.

    Takes any float dtype in any memory format, and returns it (under autocast, autocast's dtype).

    On a CPU, 3 x 3 taps without strides run by Winograd's minimal filtering where that is faster, in integers: the same
    bits. The transformed weight is kept beside this one as long as it lives, and has 8 bytes for each of its numbers.
    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016 (arXiv:1509.09308).

    Args:
        weight: ``(N, C / groups, kh, kw)`` int8.
        scale: ``(N,)`` float32, what one step of each output channel stands for.
        bias: ``(N,)`` float32.
        stride, padding, dilation, groups, padding_mode: As in :class:`torch.nn.Conv2d`.
        config: What happens to the input.
        activation: As in :class:`Int8Linear`.
        dtype: Of the weight, once it is float again.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.

    Example:
        >>> Int8Conv2d.from_float(torch.nn.Conv2d(3, 8, 3, padding="same"))(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    ndim = 4

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        config: Config | None = None,
        activation: str = "none",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, scale, bias, Dynamic() if config is None else config, dtype)
        _int8_arguments.activation("Int8Conv2d", activation)
        self.activation = activation
        _checks.choice("Int8Conv2d", "padding_mode", padding_mode, MODES)
        self.kernel_size = weight.shape[2], weight.shape[3]
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.groups, self.padding_mode = groups, padding_mode
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.folded: str | None = None  # the name of a norm that is part of these numbers

    @classmethod
    def from_float(
        cls,
        layer: nn.Conv2d,
        config: Config | None = None,
        norm: nn.BatchNorm2d | None = None,
        *,
        activation: str = "none",
    ) -> Any:
        """One scale for each output channel; a norm in evaluation mode that follows becomes part of them.

        A norm multiplies the scales, and where it is negative turns the signs: the same int8 numbers as without it.
        """
        weight, scale = rounded(layer.weight)
        bias = float32(layer.bias)
        if norm is not None:
            factor, bias = _affine(norm, bias)
            scale = (scale.double() * factor.abs()).float()
            weight = torch.where(factor.reshape(-1, 1, 1, 1) < 0, -weight, weight)
        return cls(
            weight,
            scale,
            bias,
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            config=config,
            activation=activation,
            dtype=layer.weight.dtype,
        )

    def to_float(self) -> nn.Conv2d:
        self._refuse_activation()
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        return with_parameters(layer, self.float_weight(), self.bias, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        padded, padding = self._padded(input)
        if not isinstance(self.config, WeightOnly):
            weight, scale, bias, input_scale = self._tensors()
            output = conv2d(
                padded,
                weight,
                scale,
                bias,
                input_scale=input_scale,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
                activation=self.activation,
            )
            return self._out(output)
        with torch.autocast(input.device.type, enabled=False):
            dtype = torch.promote_types(padded.dtype, torch.float32)
            wide = self.float_weight().to(dtype), None if self.bias is None else self.bias.to(dtype)
            output = F.conv2d(padded.to(dtype), *wide, self.stride, padding, self.dilation, self.groups)
            output = ACTIVATED[self.activation](output)
        return self._out(output.to(input.dtype))

    def _padded(self, input: Tensor) -> tuple[Tensor, Pair]:
        """The input, and the zeros that are still to be put around it, as many on each side."""
        before, after = self._sides()
        if self.padding_mode == "zeros" and before == after:
            return input, before
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, (before[1], after[1], before[0], after[0]), mode), (0, 0)

    def _sides(self) -> tuple[Pair, Pair]:
        """Padding above and to the left, and below and to the right."""
        if not isinstance(self.padding, str):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0, 0), (0, 0)
        total = [dilation * (taps - 1) for dilation, taps in zip(self.dilation, self.kernel_size, strict=True)]
        return (total[0] // 2, total[1] // 2), (total[0] - total[0] // 2, total[1] - total[1] // 2)

    def extra_repr(self) -> str:
        window = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return f"{super().extra_repr()}, {window}" + (f", folded={self.folded}" if self.folded else "")


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _affine(norm: nn.BatchNorm2d, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor and bias of each channel that convolution and norm have together, in float64 and float32."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.detach().double()
    shift = (0 if bias is None else bias.double()) - mean.double()
    shift = shift * factor
    if norm.affine:
        shift = shift + norm.bias.detach().double()
    return factor, shift.float()
