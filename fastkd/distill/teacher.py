"""A model that teaches and is not changed by it: :class:`Teacher`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..int8 import Dynamic, quantize_
from ..int8.choosing import Configs
from .batches import mapped, tensors
from .capture import Capture
from .paths import modules_of, unwrap


class Teacher:
    """A model as a teacher. Each call runs it in evaluation mode and without gradients, and leaves it as it was.

    Every submodule counts as in evaluation mode during the call, whoever called ``train()``: no dropout, and BatchNorm
    uses its statistics and does not update them. Modes are put back afterwards. A forward that changes a buffer of the
    ``state_dict`` all the same is an error.

    Args:
        model: The model. With any of the other arguments a copy is made.
        dtype: Computes in this dtype: floating-point parameters, buffers and inputs are cast.
        device: Stays on this device. Inputs go there, and outputs to where the inputs were.
        int8: True, or a config of :func:`fastkd.int8.quantize_`: layers that multiply int8.

    Raises:
        TypeError: a wrong type.
        RuntimeError: in a call: the model changed itself.

    Example:
        >>> teacher = Teacher(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout()), dtype=torch.bfloat16)
        >>> teacher.model[0].weight.dtype
        torch.bfloat16
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        int8: bool | Configs = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            _checks.bad_type("Teacher", "model", "be a module", type(model).__name__)
        if dtype is not None and dtype not in _checks.FLOATS:
            _checks.bad_value("Teacher", "dtype", "be float16, bfloat16, float32 or float64", dtype)
        self.dtype, self.device = dtype, None if device is None else torch.device(device)
        if int8 is not False or dtype is not None or device is not None:
            model = copy.deepcopy(model).eval()
            if int8 is not False:
                quantize_(model, Dynamic() if int8 is True else int8)
            model.to(device=self.device, dtype=dtype)
        self.model = model

    def run(
        self, call: Callable[[nn.Module, Any], Any], inputs: Any, capture: Capture, only: Iterable[str]
    ) -> dict[str, Any]:
        """The values of these paths when the model is called with these inputs."""
        home = next(tensors(inputs), None)
        if self.device is not None or self.dtype is not None:
            inputs = mapped(self._cast, inputs)
        with torch.no_grad(), frozen(self.model):
            values = capture.run(lambda: call(self.model, inputs), only)
        if self.device is not None and home is not None:
            values = mapped(lambda value: value.to(home.device), values)
        return values

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """To the device that ``Module.to`` brings others to; its numbers stay what they are."""
        if self.device is not None:
            return
        some = next(iter(self.model.parameters()), next(iter(self.model.buffers()), None))
        if some is not None:
            self.model.to(device=change(torch.empty(0, dtype=some.dtype, device=some.device)).device)


@contextmanager
def frozen(model: nn.Module, who: str = "teacher") -> Iterator[None]:
    """Every submodule in evaluation mode, and all as it was afterwards.

    The attribute is set, as ``train()`` and ``eval()`` may do more in a model of its own: fold weights, for example.
    """
    modules = modules_of(model)
    trained = [module for module in modules if module.training]
    before = [] if torch.compiler.is_compiling() else _versions(modules)
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True
    changed = [
        next(f"{prefix}.{name}".lstrip(".") for prefix, other in model.named_modules() if other is module)
        for module, name, tensor, version in before
        if module._buffers.get(name) is not tensor or tensor._version != version
    ]
    if changed:
        raise RuntimeError(
            f"Distiller: the {who} ({type(unwrap(model)).__name__}) changed {', '.join(changed[:5])} "
            "in its forward, in evaluation mode"
        )


def _versions(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, int]]:
    """Of the buffers of a state_dict, as BatchNorm's: which tensor it is, and how often it was changed in place.

    Not of parameters: what shards a model moves them about.
    """
    return [
        (module, name, tensor, tensor._version)
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set and not tensor.is_inference()
    ]
