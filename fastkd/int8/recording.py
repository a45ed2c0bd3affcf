"""Who makes each tensor of a model and who takes it, seen in one run.

A run sees what no module's name says and what a symbolic tracer stops at: every torch function with the tensors that
go in and come out, whatever Python is around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .. import _checks

# Functions and properties that look at a tensor's kind and not at its numbers.
READS = frozenset(
    (
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf", "grad_fn"),
        *("size", "dim", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "is_floating_point"),
        *("grad", "names", "itemsize", "element_size", "get_device", "__len__"),
    )
)

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Call:
    """One torch function that was called."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def name(self) -> str:
        function: Any = self.function
        name: str = getattr(function, "__name__", "")
        # A property's getter is a bound method of its descriptor.
        return str(function.__self__.__name__) if name == "__get__" else name

    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))


class Recording(TorchFunctionMode):
    """The calls of one run, in order. All its tensors are kept, so that none takes another's place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.shown: list[Tensor] = []  # to whoever may do anything with them
        self.users: dict[int, list[Call]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        call = Call(function, args, kwargs, output)
        if call.name not in READS:
            self.calls.append(call)
            for key in {memory(tensor) for tensor in call.inputs()}:
                self.users.setdefault(key, []).append(call)
        return output

    def show(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What a hook sees may go anywhere."""
        self.shown.extend(_tensors((args, kwargs, output)))

    def uses(self, tensor: Tensor) -> list[Call]:
        """All calls that took this tensor, or another in the same memory."""
        return self.users.get(memory(tensor), [])

    def is_shown(self, tensor: Tensor) -> bool:
        return memory(tensor) in {memory(other) for other in self.shown}


def record(model: nn.Module, example: Example) -> Recording:
    recording = Recording()
    hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    handles = [module.register_forward_hook(recording.show, with_kwargs=True) for module in hooked]
    try:
        with torch.no_grad(), recording:
            output = run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    recording.shown.extend(_tensors(output))
    return recording


def run(model: nn.Module, example: Example) -> Any:
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, Mapping) else model(example)


def check(op: str, model: Any, example: Any = None, argument: str = "model") -> None:
    """A model as the functions of this package take it, and what it is called with."""
    if not isinstance(model, nn.Module):
        _checks.bad_type(op, argument, "be a torch.nn.Module", type(model).__name__)
    if model.training:
        _checks.bad_value(op, argument, "be in evaluation mode (call eval())", "training=True")
    if example is not None and not isinstance(example, (Tensor, tuple, Mapping)):
        rule = "be a tensor, a tuple of arguments or a dict of keyword arguments"
        _checks.bad_type(op, "example", rule, type(example).__name__)


def memory(tensor: Tensor) -> int:
    """The same number for all tensors in the same memory."""
    return id(tensor) if tensor.layout is not torch.strided else tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
