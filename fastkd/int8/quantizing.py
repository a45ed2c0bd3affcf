"""Layers of a model, made int8 in place, and back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .. import _checks
from .agreement import Agreement
from .choosing import FLOAT_LAYERS, Choice, Configs, Filter, choose, pruning
from .configs import Dynamic
from .conv import Int8Conv2d
from .embedding import Int8Embedding
from .folding import foldable
from .layer import Int8Layer
from .linear import Int8Linear
from .observers import Observer, observer
from .recording import Example, check, run
from .training import PREPARED

FORMS: dict[type[nn.Module], type[Any]] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d, nn.Embedding: Int8Embedding}
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize_` did."""

    layers: dict[str, str]
    """The int8 layers by name, and what happens to their input."""
    folded: dict[str, str]
    """Norms that became part of a convolution, and its name."""
    left: dict[str, str]
    """Layers with a matrix of weights that were left as they are, and why."""


@torch.inference_mode(False)  # whose tensors cannot be written to later, nor be known again once they are packed
def quantize_(
    model: nn.Module,
    config: Configs | None = None,
    filter_fn: Filter | None = None,
    *,
    example: Example | None = None,
    min_sqnr: float | None = None,
) -> Quantized:
    """Make the linear, convolutional and embedding layers of a model int8, in place. Same as, for each of them::

        layer = Int8Linear.from_float(layer, config)

    The modules themselves change their class, so that whoever holds one (the root too) holds the int8 layer. Hooks
    stay. Weights that layers share are quantised once and stay shared. A ``BatchNorm2d`` that alone takes the output
    of a convolution becomes part of it, where a symbolic trace shows that. Weights that are 0 (pruned) stay 0.

    Only layers whose class is exactly :class:`torch.nn.Linear`, ``Conv2d`` or ``Embedding``, or was made by
    :func:`prepare_qat_`, which also keep the config that they were trained with. All others, and those that are int8
    already, are left as they are.

    To load: build the float model, call ``eval()``, call this with the same arguments, then ``load_state_dict``.

    Args:
        model: In evaluation mode. Tensors on the meta device are fine.
        config: :class:`Dynamic` (the default), :class:`Static` or :class:`WeightOnly`; or a dict of name patterns
            (``fnmatch``) to these, or to None for layers that stay float: the first pattern that matches holds.
        filter_fn: Called with module and name; False leaves the layer float.
        example: A batch: a tensor, a tuple of arguments or a dict of keyword arguments. The float model is run with it,
            layers with Static are calibrated by it, and ``min_sqnr`` is judged by it.
        min_sqnr: Leave a layer float if its output for the inputs of the example has a ratio of signal to noise below
            this, in dB.

    Raises:
        TypeError: a wrong type.
        ValueError: no layer can be quantised; a model in training mode; weights that are not finite; a pattern that
            matches no name; ``min_sqnr`` without an example.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
        >>> quantize_(model, Dynamic(skip="2"))
        Quantized(layers={'0': 'dynamic'}, folded={}, left={'2': 'its name is skipped'})
        >>> model[0]
        Int8Linear(8, 4, dynamic, bias=True)
    """
    check("quantize_", model, example)
    if min_sqnr is not None and example is None:
        _checks.bad_value("quantize_", "example", "be given with min_sqnr", None)
    threshold = None if min_sqnr is None else _checks.number("quantize_", "min_sqnr", min_sqnr)
    kinds = (*FLOAT_LAYERS, *PREPARED.values())
    chosen, left = choose("quantize_", model, Dynamic() if config is None else config, filter_fn, kinds)
    if not chosen and not any("int8 already" in reason for reason in left.values()):
        _checks.bad_value("quantize_", "model", "have a layer that may become int8", left or "none with weights")
    _refuse_non_finite(chosen)
    norms = foldable(model) if any(isinstance(choice.module, nn.Conv2d) for choice in chosen) else {}
    tried = _try(model, chosen, norms, example) if example is not None else {}
    done, folded, twins = {}, {}, _Twins(chosen)
    for choice in chosen:
        trial = tried.get(choice.module)
        if threshold is not None and not (trial and trial.agreement.sqnr() >= threshold):
            sqnr = f"its SQNR is {trial.agreement.sqnr():.1f} dB" if trial else "the example does not reach it"
            left[choice.name] = sqnr
            continue
        name, norm = norms.get(choice.module, ("", None))
        new = trial.layer if trial else _form(choice, norm)
        twins.join(choice.module, new)
        if norm is not None:
            new.folded, folded[name] = name, choice.name
            become(norm, nn.Identity())
        become(choice.module, new)
        done[choice.name] = new.config.scheme
    return Quantized(done, folded, left)


@torch.inference_mode(False)
def dequantize(model: nn.Module) -> nn.Module:
    """A copy of a model whose int8 layers are float again, with the numbers that they have now. Same as, for each::

        layer = layer.to_float()

    Norms that became part of a convolution stay there; weights that were shared are. Where :func:`quantize_` was called
    with :class:`WeightOnly`, the copy computes what the model computes.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
        >>> _ = quantize_(model)
        >>> dequantize(model)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    if not isinstance(model, nn.Module):
        _checks.bad_type("dequantize", "model", "be a torch.nn.Module", type(model).__name__)
    result = copy.deepcopy(model)
    parameters: dict[Tensor, Any] = {}
    for module in list(result.modules()):
        if isinstance(module, Int8Layer):
            new: Any = module.to_float()
            new.weight = parameters.setdefault(module.weight, new.weight)
            become(module, new)
    return result


def become(module: nn.Module, new: nn.Module) -> None:
    """Make a module another one, whoever holds it. Its hooks, its mode and what people noted on it stay."""
    own = _own_names()
    kept = {name: value for name, value in vars(module).items() if name in HOOKS or name not in own}
    state = {**vars(new), **kept, "training": module.training}
    vars(module).clear()
    module.__class__ = type(new)
    vars(module).update(state)
    pre_hooks = module._forward_pre_hooks
    for key in [key for key, hook in pre_hooks.items() if isinstance(hook, BasePruningMethod)]:
        del pre_hooks[key]  # what it would mask is masked


@lru_cache
def _own_names() -> frozenset[str]:
    """Of what the layers themselves keep; pruning keeps the weight there, too."""
    number, scale = torch.zeros(1, 1, dtype=torch.int8), torch.ones(1)
    layers = (
        *(nn.Linear(1, 1, device="meta"), nn.Conv2d(1, 1, 1, device="meta"), nn.Embedding(1, 1, device="meta")),
        *(Int8Linear(number, scale), Int8Conv2d(number[:, :, None, None], scale), Int8Embedding(number, scale)),
        nn.BatchNorm2d(1, device="meta"),
    )
    return frozenset(("weight", "bias", *(name for layer in layers for name in vars(layer))))


def _form(choice: Choice, norm: nn.BatchNorm2d | None) -> Any:
    """The int8 layer of a float one."""
    module: Any = choice.module
    for hook in pruning(module):
        setattr(module, hook._tensor_name, hook.apply_mask(module))
    prepared = isinstance(module, tuple(PREPARED.values()))
    kind = next(kind for kind in type(module).__mro__ if kind in FORMS)
    more = () if norm is None else (norm,)
    new = FORMS[kind].from_float(module, module.config if prepared else choice.config, *more)
    if prepared and new.input_scale is not None:
        new.input_scale.copy_(module.input_scale)
    return new


def _refuse_non_finite(chosen: Sequence[Choice]) -> None:
    for choice in chosen:
        for name, value in choice.module.named_parameters(recurse=False):
            if not value.is_meta and not bool(value.detach().isfinite().all()):
                _checks.bad_value(
                    "quantize_", "model", f"have finite numbers in {choice.name}.{name}", "NaN or infinity"
                )


class _Twins:
    """Layers that share a weight."""

    def __init__(self, chosen: Sequence[Choice]) -> None:
        # Held as long as there may be another: a number that is free again may name another tensor.
        held = [choice.module._parameters.get("weight") for choice in chosen]
        count = Counter(id(weight) for weight in held if weight is not None)
        self.weights = {id(weight): weight for weight in held if count[id(weight)] > 1}
        self.first: dict[int, Int8Layer] = {}

    def join(self, module: nn.Module, new: Int8Layer) -> None:
        key = id(module._parameters.get("weight"))
        if key in self.weights and getattr(new, "folded", None) is None:
            first = self.first.setdefault(key, new)
            new.weight, new.scale = first.weight, first.scale


@dataclass
class _Trial:
    layer: Any
    observer: Observer | None
    agreement: Agreement = field(default_factory=Agreement)


def _try(
    model: nn.Module, chosen: Sequence[Choice], norms: dict[nn.Module, tuple[str, nn.BatchNorm2d]], example: Example
) -> dict[nn.Module, _Trial]:
    """int8 layers beside the float ones, on the inputs that these get: calibrated and compared."""
    trials: dict[nn.Module, _Trial] = {}

    def hook(choice: Choice) -> Any:
        _, norm = norms.get(choice.module, ("", None))

        def compare(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            input = args[0] if args else kwargs["input"]
            if module not in trials:
                layer = _form(choice, norm)
                unknown = layer.input_scale is not None and bool(layer.input_scale.isnan())
                trials[module] = _Trial(layer, observer(layer.config) if unknown else None)
            trial = trials[module]
            if trial.observer is not None:
                trial.observer.see(choice.name, input)
                if (scale := trial.observer.scale()) is None:
                    return  # zeros so far
                trial.layer.input_scale.fill_(scale)
            trial.agreement.add(trial.layer(input), output if norm is None else norm(output))

        return compare

    handles = [choice.module.register_forward_hook(hook(choice), with_kwargs=True) for choice in chosen]
    try:
        with torch.no_grad():
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return trials
