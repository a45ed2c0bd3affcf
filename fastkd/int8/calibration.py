"""Scales of inputs, found by running a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .. import _checks
from .configs import Static
from .observers import Observer, observer
from .recording import check

_calibrating: WeakSet[nn.Module] = WeakSet()


@contextmanager
def calibrate(model: nn.Module) -> Iterator[None]:
    """Find the scales of all layers with :class:`Static`: run typical batches inside. Same as, for each layer::

        input_scale = max(batch.abs().max() for batch in its_inputs) / 127

    or what the config's observer makes of them. Inside, these layers round each row by its own magnitude, as with
    :class:`Dynamic`, and cannot be copied. Scales that were there before are replaced; if an exception leaves the
    context, they are not.

    Args:
        model: In evaluation mode, after :func:`quantize_` (or :func:`prepare_qat_`).

    Raises:
        TypeError: a wrong type.
        ValueError: no layer has Static, or one is calibrated already; a model in training mode; nothing was run inside;
            an input that is not finite.
        RuntimeError: a copy of the model inside.

    Warns:
        RuntimeWarning: some layers saw no input, or nothing but zeros: they keep what they had.

    Example:
        >>> from fastkd.int8 import Static, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
        >>> _ = quantize_(model, Static())
        >>> with calibrate(model):
        ...     _ = model(torch.tensor([[1.0, -2.54, 0.5, 0.0]]))
        >>> model[0].input_scale
        tensor(0.0200)
    """
    check("calibrate", model)
    layers = static_layers(model)
    if not layers:
        _checks.bad_value("calibrate", "model", "have layers that were quantized with Static()", "none")
    if busy := [name for name, layer in layers.items() if layer in _calibrating]:
        rule = "have no layer that is calibrated already"
        _checks.bad_value("calibrate", "model", rule, f"{', '.join(busy)} in another context")
    before = {name: layer.input_scale for name, layer in layers.items()}
    observers = {name: observer(layer.config) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(_Watch(name, observers[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    for layer in layers.values():
        layer.input_scale = None  # which rounds each row by itself
        _calibrating.add(layer)
    scales: dict[str, float | None] = {}
    try:
        yield
        scales = {name: one.scale() for name, one in observers.items()}
    finally:
        for handle in handles:
            handle.remove()
        with torch.inference_mode(False):  # whose tensors no state_dict could be loaded into later
            for name, layer in layers.items():
                scale, old = scales.get(name), before[name]
                layer.input_scale = old if scale is None else torch.full_like(old, scale)
                _calibrating.discard(layer)
    _complain(scales)


def static_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer whose input has one scale, float layers that are trained for it too."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if (layer._buffers.get("input_scale") is not None or layer in _calibrating) and isinstance(layer.config, Static)
    }


@dataclass(frozen=True, eq=False)
class _Watch:
    """The hook of a layer that is calibrated. It goes into no copy: that would round by row forever."""

    name: str
    seen: Observer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.seen.see(self.name, args[0] if args else kwargs["input"])

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("calibrate: a model cannot be copied or saved inside: it has no input scales there")


def _complain(scales: dict[str, float | None]) -> None:
    unknown = [name for name, scale in scales.items() if scale is None]
    if len(unknown) == len(scales):
        _checks.bad_value(
            "calibrate", "model", "be run inside the context, on inputs that are not all 0", "no such run"
        )
    if unknown:
        message = f"calibrate: these layers saw no input, or nothing but zeros: {', '.join(unknown)}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
