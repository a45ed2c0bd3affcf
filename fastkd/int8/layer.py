"""What the int8 layers have in common: their buffers, and how these move, load and stay shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import _checks, _int8_arguments
from .._int8 import quantize_channels
from .configs import Config, Static

Layer = TypeVar("Layer", bound=nn.Module)
# Conversion that is being applied to a model -> what it made of each buffer, so that shared buffers stay shared.
_moved: WeakKeyDictionary[Callable[..., Any], dict[int, tuple[ref[Tensor], ref[Tensor]]]] = WeakKeyDictionary()


class Int8Layer(nn.Module):
    """Plain buffers: an int8 ``weight``, a float32 ``scale`` for each of its slices along dimension 0, maybe a float32
    ``bias`` and, with :class:`Static`, the float32 ``input_scale``. It is NaN until it is known, which a CPU refuses to
    run with and from which all other devices make NaN.

    Casting a model casts none of them; ``dtype`` follows, which is what a dequantised weight has.
    """

    ndim: ClassVar[int] = 2  # of the weight
    activation: str = "none"  # what follows in the same pass
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        op = type(self).__name__
        _int8_arguments.weight(op, weight, self.ndim)
        self.config, self.dtype = config, dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", _int8_arguments.by_channel(op, "scale", scale, weight, torch.float32))
        given = None if bias is None else _int8_arguments.by_channel(op, "bias", bias, weight, torch.float32)
        self.register_buffer("bias", given)
        static = isinstance(config, Static)
        self.register_buffer("input_scale", torch.full_like(scale[:1].sum(), torch.nan) if static else None)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Weight, scale, bias and input scale, from where buffers are: an attribute is sought everywhere else first."""
        buffers: dict[str, Any] = self._buffers
        return buffers["weight"], buffers["scale"], buffers["bias"], buffers["input_scale"]

    def float_weight(self) -> Tensor:
        """What the int8 numbers stand for, in float32."""
        return self.weight.float() * self.scale.reshape(-1, *[1] * (self.weight.ndim - 1))

    def to_float(self) -> nn.Module:
        """The layer that this one came from, with the numbers that it has now."""
        raise NotImplementedError

    def _refuse_activation(self) -> None:
        if self.activation != "none":
            rule = "be 'none' in a layer that becomes float, which has none"
            _checks.bad_value(type(self).__name__, "activation", rule, repr(self.activation))

    def _out(self, output: Tensor) -> Tensor:
        """In the dtype that a float layer's output has: autocast decides, if it is on."""
        kind = output.device.type
        if not torch.is_autocast_enabled(kind) or output.dtype is torch.float64:
            return output
        return output.to(torch.get_autocast_dtype(kind))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = _moved.setdefault(fn, {})
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            same_old, same_new = moved.get(id(old), (None, None))
            if same_old is not None and same_new is not None and same_old() is old and (twin := same_new()) is not None:
                new = twin
            elif new.dtype is not old.dtype:
                new = old.to(new.device)
            new = new.contiguous()  # channels_last is of no use to a weight that is packed, and found by its identity
            moved[id(old)] = ref(old), ref(new)
            self._buffers[name] = new
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, Tensor) and given.dtype is not torch.int8:
            *_, errors = arguments
            got = str(given.dtype).removeprefix("torch.")
            errors.append(f"{prefix}weight must be int8, got {got}: load float weights first, then call quantize_")
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        sizes = ", ".join(str(size) for size in self.weight.shape)
        ending = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{sizes}, {self.config.scheme}, bias={self.bias is not None}{ending}"


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers and float32 scales, whatever the dtype and layout."""
    return quantize_channels(weight.detach().float().contiguous())


def float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32, copy=True)


def with_parameters(layer: Layer, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Layer:
    """A float layer that was made without memory, with these numbers."""
    layer.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype, copy=True))
    return layer.eval()
