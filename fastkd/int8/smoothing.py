"""Outliers of activations, moved into the weights behind them: SmoothQuant."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .recording import Call, Example, Recording, check, record

NORMS = (F.layer_norm, F.rms_norm)
CASTS = frozenset(("contiguous", "clone", "detach", "to", "type_as", "float", "half", "bfloat16", "double"))
# What moves numbers and leaves them alone otherwise. Where the channels end up is tried out.
MOVES = frozenset(
    (
        *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
        *("expand_as", "transpose", "permute", "swapaxes", "movedim", "select", "narrow", "__getitem__"),
    )
)


def smooth(model: nn.Module, example: Example, alpha: float = 0.5) -> dict[str, tuple[str, ...]]:
    r"""Scale the channels between a norm and the linear layers behind it, so that both sides are easy to round. For
    activations :math:`X` and weights :math:`W` of channel :math:`j`, same as::

        s = X.abs().amax(0) ** alpha / W.abs().amax(0) ** (1 - alpha)
        norm.weight /= s; norm.bias /= s; linear.weight *= s

    in place, and to be called before :func:`quantize_`. The model's function stays what it is.

    Pairs are found by running the model once and watching every torch function, not by the names of classes: a norm is
    ``layer_norm``, ``rms_norm``, or anything that ends by multiplying with a parameter of one number per channel. A
    pair counts if every use of the norm's output is the input of a linear layer (maybe reshaped, sliced or cast), and
    no parameter of the pair is used anywhere else. So a norm whose output also goes into a residual sum is left alone.

    Args:
        model: In evaluation mode.
        example: A batch to see the activations of: a tensor, a tuple of arguments or a dict of keyword arguments. All
            activations of this run are kept until it ends.
        alpha: How much goes from the activations to the weights, in [0, 1].

    Returns:
        The name of each norm that was scaled, with the names of its linear layers.

    Raises:
        TypeError: a wrong type.
        ValueError: no pair is found; a model in training mode; alpha outside of [0, 1]; an activation or a weight of a
            pair that is not finite.

    Source: Xiao et al. 2022, arXiv 2211.10438.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)).eval()
        >>> smooth(model, torch.randn(8, 4))
        {'0': ('1',)}
    """
    check("smooth", model, example)
    alpha = _checks.fraction("smooth", "alpha", alpha)
    finder = _Finder(record(model, example), {id(value): name for name, value in model.named_parameters()})
    pairs = list(finder.pairs())
    if not pairs:
        rule = "have a norm whose output only linear layers take"
        _checks.bad_value(
            "smooth", "model", rule, finder.reason or "one without any norm that has a weight per channel"
        )
    factors = [_factor(finder.names, pair, alpha) for pair in pairs]  # all of them before the first change
    with torch.no_grad():
        for pair, factor in zip(pairs, factors, strict=True):
            for parameter in pair.norm:
                parameter.copy_((parameter.double() / factor.view_as(parameter)).to(parameter.dtype))
            for call in pair.linears:
                call.args[1].copy_((call.args[1].double() * factor).to(call.args[1].dtype))
    return {
        _layer(finder.names[id(pair.norm[0])]): tuple(_layer(finder.names[id(call.args[1])]) for call in pair.linears)
        for pair in pairs
    }


@dataclass
class _Pair:
    norm: list[Tensor]  # weight, and what is added after it
    linears: list[Call] = field(default_factory=list)


class _Finder:
    def __init__(self, recording: Recording, names: dict[int, str]) -> None:
        self.recording = recording
        self.names = names  # of parameters
        self.reason: str | None = None  # why the last norm is in no pair

    def pairs(self) -> Iterator[_Pair]:
        for call in self.recording.calls:
            norm = self._norm(call)
            if not norm:
                continue
            pair = _Pair(norm)
            alone = all(self._is_used_by(parameter, call) for parameter in norm)
            reason = self._follow(call, pair) if alone else "weight is used elsewhere too"
            if reason is None:
                yield pair
            elif self.reason is None:
                self.reason = f"{_layer(self.names[id(norm[0])])}, whose {reason}"

    def _norm(self, call: Call) -> list[Tensor]:
        """Weight and bias of a call that ends with an affine map of each channel; nothing if it does not."""
        if call.function in NORMS:
            given = inspect.signature(call.function).bind(*call.args, **call.kwargs).arguments
            affine = [given.get("weight"), given.get("bias")]
        elif call.name == "mul" and len(call.args) == 2 and not call.kwargs:
            affine = [value for value in call.args if self._is_channelwise(value, call.output)]
        else:
            return []
        parameters = [value for value in affine if value is not None]
        if not parameters or affine[0] is None or not all(self._is_channelwise(x, call.output) for x in parameters):
            return []
        return parameters

    def _is_channelwise(self, value: Any, output: Any) -> bool:
        if not isinstance(value, Tensor) or not isinstance(output, Tensor) or id(value) not in self.names:
            return False
        return output.ndim > 0 and value.ndim > 0 and value.numel() == value.shape[-1] == output.shape[-1]

    def _is_used_by(self, parameter: Tensor, call: Call) -> bool:
        return self.recording.uses(parameter) == [call] and not self.recording.is_shown(parameter)

    def _follow(self, norm: Call, pair: _Pair) -> str | None:
        """Collect the linear layers that take the norm's output; why not, if anybody else does too."""
        reached: list[Tensor] = [norm.output]
        seen: list[Call] = []
        for tensor in reached:  # which grows
            if self.recording.is_shown(tensor):
                return "output the model returns or shows to a hook"
            for call in self.recording.uses(tensor):
                if call in seen:
                    continue
                seen.append(call)
                given = call.args[0] if call.args else None
                if not isinstance(given, Tensor) or not _is_one_of(given, reached):
                    return f"output {call.name} takes too"
                if call.function is F.linear and self._is_weight(call):
                    pair.linears.append(call)
                elif self._adds_bias(call, pair):
                    pair.norm.append(call.args[1])
                    reached.append(call.output)
                elif _keeps_channels(call):
                    reached.append(call.output)
                else:
                    return f"output {call.name} takes too"
        return None if pair.linears else "output no linear layer takes"

    def _is_weight(self, call: Call) -> bool:
        weight = call.args[1] if len(call.args) > 1 else None
        return isinstance(weight, Tensor) and id(weight) in self.names and self._is_used_by(weight, call)

    def _adds_bias(self, call: Call, pair: _Pair) -> bool:
        return (
            call.name == "add"
            and len(pair.norm) == 1
            and len(call.args) == 2
            and not call.kwargs
            and self._is_channelwise(call.args[1], call.output)
            and self._is_used_by(call.args[1], call)
        )


def _keeps_channels(call: Call) -> bool:
    """Whether it moves or casts numbers alone, and leaves each in the channel where it was."""
    given, output = call.args[0], call.output
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return False
    if call.name == "dropout":
        options = inspect.signature(F.dropout).bind(*call.args, **call.kwargs).arguments
        return not options.get("training", True)
    if call.name not in MOVES:
        return call.name in CASTS
    channels = torch.arange(given.shape[-1], device=given.device)
    moved: Tensor = call.function(channels.expand(given.shape), *call.args[1:], **call.kwargs)
    return moved.ndim > 0 and moved.shape[-1] == len(channels) and bool((moved == channels).all())


def _is_one_of(tensor: Tensor, reached: list[Tensor]) -> bool:
    return any(tensor is other for other in reached)


def _factor(names: dict[int, str], pair: _Pair, alpha: float) -> Tensor:
    columns = [call.args[0].detach().abs().double().flatten(0, -2) for call in pair.linears]
    weights = [call.args[1].detach().abs().double() for call in pair.linears]
    largest = [torch.cat([part.new_zeros(1, part.shape[1]), part]).amax(0) for part in (*columns, *weights)]
    activation = torch.stack(largest[: len(columns)]).amax(0)
    weight = torch.stack(largest[len(columns) :]).amax(0)
    layer = _layer(names[id(pair.norm[0])])
    for name, values in (("example", activation), ("model", weight)):
        if not bool(values.isfinite().all()):
            _checks.bad_value("smooth", name, f"be finite behind {layer}", "NaN or infinity")
    factor = (activation**alpha / weight ** (1 - alpha)).clamp(min=1e-5)
    return torch.where((activation > 0) & (weight > 0), factor, 1.0)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]
