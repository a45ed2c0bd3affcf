"""``torch.nn.Linear`` with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _int8_arguments
from .._int8_operators import linear, weight_only_linear
from .configs import Config, Dynamic, WeightOnly
from .layer import Int8Layer, float32, rounded, with_parameters


class Int8Linear(Int8Layer):
    """A linear layer whose weights, and unless the config is :class:`WeightOnly` inputs too, are int8. Same as::

        F.linear(rounded(x), weight * scale[:, None], bias)

    with ``rounded(x)`` to 127 steps on each side of zero. Inference only: a backward through it raises.

    Takes any float dtype, and returns it (under autocast, autocast's). As the head of a teacher whose logits shall
    never be there: :meth:`fastkd.Head.from_layer`.

    Args:
        weight: ``(N, K)`` int8.
        scale: ``(N,)`` float32, what one step of each row stands for.
        bias: ``(N,)`` float32.
        config: What happens to the input.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"`` in the same pass over the output, in float32.
            For models that are built of int8 layers: :func:`quantize_` leaves activations where they are.
        dtype: Of the weight, once it is float again.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> Int8Linear.from_float(layer).weight
        tensor([[  64, -127]], dtype=torch.int8)
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        config: Config | None = None,
        activation: str = "none",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, scale, bias, Dynamic() if config is None else config, dtype)
        _int8_arguments.activation("Int8Linear", activation)
        self.activation = activation
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_float(cls, layer: nn.Linear, config: Config | None = None, *, activation: str = "none") -> Int8Linear:
        """One scale for each output channel; the bias is copied."""
        weight, scale = rounded(layer.weight)
        options: dict[str, Any] = {"config": config, "activation": activation, "dtype": layer.weight.dtype}
        return cls(weight, scale, float32(layer.bias), **options)

    def to_float(self) -> nn.Linear:
        self._refuse_activation()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return with_parameters(layer, self.float_weight(), self.bias, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight, scale, bias, input_scale = self._tensors()
        if isinstance(self.config, WeightOnly):
            return self._out(weight_only_linear(input, weight, scale, bias, activation=self.activation))
        return self._out(linear(input, weight, scale, bias, input_scale=input_scale, activation=self.activation))
