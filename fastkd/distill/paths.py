"""What a path names: a submodule, one of its calls, and what of it went in or came out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .. import _checks

SYNTAX = re.compile(
    r"(?P<module>[^:@\[\]]*)(@(?P<call>\d+))?(:(?P<what>input|output|attention)(?P<items>(\[[^\[\]]+\])*))?"
)
FORM = "read module, module@call, module:input, module:output[item] or module:attention"
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Place:
    """A path, read."""

    path: str
    module: str  # dotted; empty for the model itself
    call: int | None  # of the module in one forward, counted from 0; None for the last
    what: str
    items: tuple[int | str, ...]

    @property
    def is_result(self) -> bool:
        """Of what the model's own call returns, for which no hook is needed."""
        return self.module == "" and self.what != "input"

    def pick(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.what == "input":
            return self._of_input(args, kwargs)
        value = output
        items = (1,) if self.what == "attention" else self.items
        for item in items:
            value = self._item(value, item)
        if self.what == "attention" and value is None:
            raise ValueError(f"{self.path!r}: the module returns no attention weights; let it compute them")
        if self == Place(self.path, "", None, "output", ()):
            return self._logits(value)
        return value

    def _of_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, *rest = self.items or (0,)
        if isinstance(first, str):
            value = self._item(kwargs, first)
        elif args:
            value = self._item(args, first)
        else:
            value = self._item(tuple(kwargs.values()), first)
        for item in rest:
            value = self._item(value, item)
        return value

    def _item(self, value: Any, item: int | str) -> Any:
        if isinstance(item, str):
            found = value.get(item) if isinstance(value, Mapping) else getattr(value, item, None)
            if found is not None:
                return found
        elif isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and -len(value) <= item < len(value)):
            return value[item]
        raise ValueError(f"{self.path!r}: there is no item {item!r} in {describe(value)}")

    def _logits(self, value: Any) -> Any:
        """Of a model's own output: a tensor, or what has logits, as the outputs of HuggingFace models."""
        logits = logits_in(value)
        if logits is None and isinstance(value, (tuple, list, Mapping)):
            raise ValueError(
                f"the model returns {describe(value)}, of which none is called logits; "
                "name what is meant, as in ':output[0]'"
            )
        return value if logits is None else logits


def logits_in(value: Any) -> Any:
    """What a model's output calls its logits, or None."""
    return value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)


def describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def parse(op: str, path: Any) -> Place:
    if not isinstance(path, str):
        _checks.bad_type(op, "path", "be a string", type(path).__name__)
    match = SYNTAX.fullmatch(path)
    if match is None:
        _checks.bad_value(op, "path", FORM, repr(path))
    items = tuple(
        int(item) if re.fullmatch(r"-?\d+", item) else item
        for item in re.findall(r"\[([^\[\]]+)\]", match["items"] or "")
    )
    if match["what"] == "attention" and items:
        _checks.bad_value(op, "path", "have no item behind :attention", repr(path))
    call = None if match["call"] is None else int(match["call"])
    return Place(path, match["module"], call, match["what"] or "output", items)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside what DistributedDataParallel, torch.compile, FSDP and checkpointing put around it."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
            continue
        inner = next((child for name, child in module.named_children() if name in WRAPPED), None)
        if inner is None:
            return module
        module = inner


def find(op: str, model: nn.Module, place: Place, others: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """The submodule that a path names, whatever is wrapped around its parents; or an error with near matches.

    A wrapper around the submodule itself is what is returned: its hooks run outside of a compiled graph, and of what is
    checkpointed.

    ``others`` are models that the path may have been meant for.
    """
    module = model
    for name in place.module.split(".") if place.module else ():
        child = unwrap(module)._modules.get(name)
        if child is None:
            _not_found(op, model, place, others or {})
        module = child
    return module


def _not_found(op: str, model: nn.Module, place: Place, others: Mapping[str, nn.Module]) -> NoReturn:
    known = names(model)
    near = difflib.get_close_matches(place.module, known, n=5, cutoff=0.5)
    near = near or [name for name, _ in unwrap(model).named_children()][:10]
    such = f", such as {', '.join(map(repr, near))}" if near else " (it has none)"
    rule = f"name a submodule of {type(unwrap(model)).__name__}{such}"
    hint = "".join(
        f" (a path of {who}: are they swapped?)" for who, other in others.items() if place.module in names(other)
    )
    _checks.bad_value(op, "path", rule, f"{place.path!r}{hint}")


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Those of ``model.modules()``, in another order; several times as fast, as every step asks for them."""
    found, left = {model: None}, [model]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                left.append(child)
    return list(found)


def names(model: nn.Module) -> list[str]:
    """Of all submodules, without those of wrappers."""
    named = (name.split(".") for name, _ in unwrap(model).named_modules())
    return [
        name
        for name in dict.fromkeys(".".join(part for part in parts if part not in WRAPPED) for parts in named)
        if name
    ]
