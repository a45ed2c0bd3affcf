"""Norms that can become part of the convolution before them."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from .choosing import FLOAT_LAYERS


def foldable(model: nn.Module) -> dict[nn.Module, tuple[str, nn.BatchNorm2d]]:
    """For each convolution whose output goes into a norm in evaluation mode and nowhere else, that norm and its name.

    A symbolic trace shows every use of the output, which the order of modules does not, not even in a Sequential whose
    parts may also be called one by one. Where a model cannot be traced nothing is folded. A model with optional
    arguments is traced with and without them, since they may lead elsewhere.
    """
    graphs = [_graph(model, defaults) for defaults in _calls(model)]
    if not graphs or any(graph is None for graph in graphs):
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    first, *others = [_pairs(graph, modules) for graph in graphs if graph is not None]
    return {
        modules[conv]: (norm, modules[norm])
        for conv, norm in first.items()
        if all(other.get(conv) == norm for other in others)
    }


def _calls(model: nn.Module) -> list[dict[str, Any]]:
    """Arguments that are fixed, for each trace."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return [{}, defaults] if defaults else [{}]


def _graph(model: nn.Module, fixed: dict[str, Any]) -> fx.Graph | None:
    # A forward may leave what it computed in the module, which here are no tensors: the modules are copies.
    tensors = [*model.parameters(), *model.buffers()]
    try:
        shadow = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        return _Tracer().trace(shadow, fixed)
    except Exception:  # whatever the model's own code makes of values that are not there
        return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers that are trained with rounded numbers are no modules of torch's, but one step all the same."""
        return isinstance(m, FLOAT_LAYERS) or super().is_leaf_module(m, module_qualified_name)


def _pairs(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, str]:
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = {}
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.BatchNorm2d:
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or list(before.users) != [node]:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        names = {str(before.target), str(node.target)}
        once = calls[conv] == calls[norm] == 1 and not names & read
        if once and isinstance(conv, nn.Conv2d) and _is_fixed(norm) and not conv._forward_hooks:
            pairs[str(before.target)] = str(node.target)
    return pairs


def _is_fixed(norm: nn.Module) -> bool:
    """Whether it is the same map of each channel for every batch, and nobody looks at its input."""
    assert isinstance(norm, nn.BatchNorm2d)
    return not norm.training and isinstance(norm.running_mean, torch.Tensor) and not norm._forward_pre_hooks
