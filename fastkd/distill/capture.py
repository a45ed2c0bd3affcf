"""What goes into and comes out of a model's submodules during a forward: :class:`Capture`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _checks
from .paths import Place, find, modules_of, parse, unwrap

STALE = (
    "; the model is compiled, and a graph that was made before there was a Capture does not look for hooks: make the "
    "Capture (or the Distiller) before the first call, or call torch._dynamo.reset()"
)


class Capture:
    """A model that returns what its submodules compute. Calling it calls the model, once::

        values = Capture(model, ["", "layer3", "layer4.0:input"])(images)
        values["layer3"]  # what model.layer3 returned

    A path is the dotted name of a submodule, as in ``model.named_modules()``, with up to three things behind it:

    ==============================  ==================================================================================
    ``"layer3"``                    its output
    ``"layer3:input"``              its first argument; ``"layer3:input[1]"`` the second, ``"layer3:input[mask]"`` the
                                    one with this name
    ``"layer3:output[1]"``          an item of its output, by index, key or attribute; more may follow: ``[a][0]``
    ``"layer3:attention"``          attention weights: the second item of its output. An ``nn.MultiheadAttention`` is
                                    made to compute them, one matrix a head, if its caller does not ask for them
    ``"layer3@0"``                  of its first call, where one forward calls it several times; without it, of the last
    ``""``                          the model's logits: its output if that is a tensor, or the ``logits`` in it
    ``":output[0]"``, ``":input"``  an item of the model's output, and its input
    ==============================  ==================================================================================

    Names are those of the model itself: what DistributedDataParallel, ``torch.compile``, FSDP and checkpointing put
    around it or around its submodules is looked through. Values carry gradients as they do in the model.

    Hooks are there during a call only, also if it fails, and no value is kept. In a compiled model they stay, idle
    between calls, until :meth:`detach`, and ``torch._dynamo.config.skip_nnmodule_hook_guards`` is set to False: graphs
    made from then on are used where they have the hooks that there are. One that was made before does not look, and is
    used for other models of the same class too. So make the Capture before the first call.

    Args:
        model: The model.
        paths: What to return.

    Raises:
        TypeError, ValueError: no such path; the message lists near matches. In a call: no such item.
        RuntimeError: in a call: the submodule was not called, or a later layer changed its output in place.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> sorted(Capture(model, ["0", "1:input"])(torch.zeros(2, 4)))
        ['0', '1:input']
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        if not isinstance(model, nn.Module):
            _checks.bad_type("Capture", "model", "be a module", type(model).__name__)
        if isinstance(paths, str):
            _checks.bad_type("Capture", "paths", "be a sequence of paths", "a string")
        for module in model.modules():
            if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
                rule = "run in one thread: DistributedDataParallel, or DataParallel on one device"
                _checks.bad_value("Capture", "model", rule, f"DataParallel on {len(module.device_ids)} devices")
        self.model = model
        self._taps = {path: _Tap(parse("Capture", path)) for path in paths}
        self._handles: list[RemovableHandle] = []
        self._attached = False  # a tracer can read this, and no handle
        for tap in self._taps.values():
            find("Capture", model, tap.place)
        if is_compiled(model):
            self.attach()

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call the model with these arguments; the values by path."""
        return self.run(functools.partial(self.model, *args, **kwargs))

    def run(self, call: Callable[[], Any], only: Iterable[str] | None = None) -> dict[str, Any]:
        """Call this instead, which calls the model and returns its output.

        Args:
            call: Called without arguments.
            only: The paths to return; all by default.
        """
        taps = self._taps if only is None else {path: self._taps[path] for path in only}
        keep = self._attached or is_compiled(self.model)
        try:
            if not self._attached:
                self._attach(self._taps if keep else taps)
            for tap in taps.values():
                tap.recording = True
            result = call()
            values = {path: self._value(tap, result) for path, tap in taps.items()}
        except BaseException:
            keep = False
            raise
        finally:
            for tap in taps.values():
                tap.forget()
            if not keep:
                self.detach()
        return values

    @property
    def paths(self) -> list[str]:
        return list(self._taps)

    def and_also(self, paths: Iterable[str]) -> Capture:
        """Another one in its place, of more paths."""
        attached = self._attached
        self.detach()
        other = Capture(self.model, [*self._taps, *paths])
        if attached:
            other.attach()
        return other

    def attach(self) -> None:
        """Put the hooks in now, and leave them there until :meth:`detach`."""
        self.detach()
        self._attach(self._taps)

    def _attach(self, taps: Mapping[str, _Tap]) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("Capture: call attach() before torch.compile, which cannot trace how hooks are put in")
        for tap in taps.values():
            if not tap.place.is_result:
                self._handles += tap.hook(find("Capture", self.model, tap.place))
        self._attached = True
        if is_compiled(self.model):
            torch._dynamo.config.skip_nnmodule_hook_guards = False

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached = False

    def _value(self, tap: _Tap, result: Any) -> Any:
        place = tap.place
        if place.is_result:
            return place.pick((), {}, result)
        if not tap.seen:
            times = "was not called" if tap.calls == 0 else f"was called {tap.calls} times only"
            raise RuntimeError(
                f"Capture: {place.path!r} {times} in this forward{STALE if is_compiled(self.model) else ''}"
            )
        if tap.version is not None and tap.version != _version(tap.value):
            raise RuntimeError(
                f"Capture: {place.path!r} was changed in place after it was captured; set inplace=False in the layer "
                "behind it, or capture that layer"
            )
        return tap.value


class _Tap:
    """A hook, which keeps what one path names while a forward is recorded."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.forget()

    def forget(self) -> None:
        self.recording = self.seen = False
        self.calls = 0
        self.value: Any = None
        self.version: int | None = None

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        if self.place.what == "input":
            return [module.register_forward_pre_hook(self.before, with_kwargs=True)]
        handles = [module.register_forward_hook(self.after, with_kwargs=True)]
        if self.place.what == "attention" and isinstance(unwrap(module), nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(self.ask_for_weights, with_kwargs=True))
        return handles

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.after(module, args, kwargs, None)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.recording:
            return
        if self.place.call is None or self.place.call == self.calls:
            self.value = self.place.pick(args, kwargs, output)
            self.version = _version(self.value)
            self.seen = True
        self.calls += 1

    def ask_for_weights(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.recording:
            return None
        late = ("need_weights", "attn_mask", "average_attn_weights", "is_causal")
        named = {**kwargs, **dict(zip(late, args[4:], strict=False))}
        return args[:4], {**named, "need_weights": True, "average_attn_weights": False}


def _version(value: Any) -> int | None:
    """How often a tensor was changed in place."""
    if torch.compiler.is_compiling() or not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was called on it or on a submodule."""
    if torch.compiler.is_compiling():
        return True
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules_of(model))
