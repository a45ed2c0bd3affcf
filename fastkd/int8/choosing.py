"""Which layers of a model a config is for, and why the others are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from .. import _checks
from .configs import Config, Dynamic, Static, WeightOnly
from .layer import Int8Layer

Filter = Callable[[nn.Module, str], bool]
Configs = Config | Mapping[str, Config | None]
FLOAT_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Choice:
    """A layer, by its first name, and what it is to become."""

    name: str
    module: nn.Module
    config: Config


def choose(
    op: str, model: nn.Module, config: Configs, filter_fn: Filter | None, kinds: tuple[type[nn.Module], ...]
) -> tuple[list[Choice], dict[str, str]]:
    """The layers of these kinds, and the reasons of all others that have a matrix of weights."""
    rules = _rules(op, model, config)
    chosen, left = [], {}
    for names, module in _modules(model):
        reason = refusal(module, kinds)
        if reason == "":
            continue
        wanted = _config_of(names, rules)
        if reason is None and wanted is None:
            reason = "its name is skipped"
        if reason is None and filter_fn is not None and not filter_fn(module, names[0]):
            reason = "filter_fn leaves it out"
        if reason is None:
            assert wanted is not None
            chosen.append(Choice(names[0], module, wanted))
        else:
            left[names[0]] = reason
    return chosen, left


def refusal(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why it is left as it is, None if it is not, and an empty string for what has no weights to speak of."""
    if isinstance(module, Int8Layer):
        return "it is int8 already"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "it is not initialized: run the model once before"
    if type(module) not in kinds:
        weights = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        if is_parametrized(module):
            return "it is parametrized (torch.nn.utils.parametrize.remove_parametrizations ends that)"
        return f"{type(module).__name__} has no int8 form" if weights else ""
    if "forward" in vars(module):
        return "its forward is patched"
    weight: Any = module.weight
    if "weight" not in module._parameters and not pruning(module):
        return "its weight is computed by a hook"
    if weight.layout is not torch.strided or not weight.is_floating_point():
        return f"its weight is {weight.dtype}, {weight.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weight as it runs"
    more = [name for name in (*module._parameters, *module._buffers, *module._modules) if name not in _known(module)]
    return f"it also holds {', '.join(more)}" if more else None


def _known(module: nn.Module) -> set[str]:
    masked = [f"{hook._tensor_name}{end}" for hook in pruning(module) for end in ("_orig", "_mask")]
    return {"weight", "bias", "input_scale", *masked}


def pruning(module: nn.Module) -> list[BasePruningMethod]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)]


def _modules(model: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Each module once, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, its in names.items():
        yield its, module


Rules = list[tuple[str, Config | None]]


def _rules(op: str, model: nn.Module, config: Any) -> Rules:
    """Pattern -> config, in order; None leaves layers float. The first that matches holds."""
    given = dict(config) if isinstance(config, Mapping) else {"*": config}
    rules: Rules = []
    for pattern, value in given.items():
        if value is not None and not isinstance(value, (Dynamic, Static, WeightOnly)):
            rule = "be Dynamic(), Static() or WeightOnly(), or a dict of patterns to these or None"
            _checks.bad_type(op, "config", rule, repr(value))
        rules.append((pattern, value))
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in [part for key, value in rules for part in (key, *(() if value is None else value.skip))]:
        if not _match(names, pattern):
            _checks.bad_value(op, "config", "have patterns that match a name in the model", repr(pattern))
    return rules


def _config_of(names: list[str], rules: Rules) -> Config | None:
    for pattern, config in rules:
        if _match(names, pattern):
            skipped = config is None or any(_match(names, one) for one in config.skip)
            return None if skipped else config
    return None


def _match(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
