"""int8 layers called as they were called last: the same numbers without checks, and whatever differs is seen."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8_problems import flat, int8, scales, weights
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastkd import _int8_again
from fastkd import _int8_arguments as check
from fastkd.int8 import Dynamic, Int8Conv2d, Int8Linear, Static, WeightOnly

pytestmark = pytest.mark.native
OPS = {
    "linear": lambda: (int8.linear, flat(6, 12), {"weight": weights(20, 12)}),
    "rows of rows": lambda: (int8.linear, flat(2, 3, 12), {"weight": weights(20, 12)}),
    "static": lambda: (int8.linear, flat(6, 12), {"weight": weights(20, 12), "input_scale": torch.tensor(0.02)}),
    "weight-only": lambda: (int8.weight_only_linear, flat(6, 12), {"weight": weights(20, 12)}),
    "conv2d": lambda: (int8.conv2d, flat(2, 12, 7, 5), {"weight": weights(20, 12, 3, 3), "padding": (1, 2)}),
}
ops = pytest.mark.parametrize("op", OPS)


class Layer:
    """A layer's arguments, with which it was called twice."""

    def __init__(self, op: str) -> None:
        self.call, self.input, self.arguments = OPS[op]()
        self.arguments |= {"scale": scales(20), "bias": flat(20), "activation": "relu", "impl": None}
        torch.testing.assert_close(self.twice(), self.reference())

    def __call__(self) -> Tensor:
        return self.call(self.input, **self.arguments)

    def twice(self) -> Tensor:
        first = self()
        assert torch.equal(self(), first)
        return first

    def reference(self) -> Tensor:
        return self.call(self.input, **{**self.arguments, "impl": "reference"})

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


def is_checked(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> bool:
    seen, weight = [], check.weight
    with monkeypatch.context() as patch:
        patch.setattr(check, "weight", lambda *arguments: (seen.append(arguments), weight(*arguments)))
        call()
    return bool(seen)


@ops
def test_the_same_call_is_not_checked_again(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(op)
    assert not is_checked(layer, monkeypatch)
    layer.input = flat(*layer.input.shape, seed=1)
    assert not is_checked(layer, monkeypatch), "another input of the same kind"
    output = layer()
    torch.testing.assert_close(output, layer.reference())
    want = layer.call(layer.input, **{**layer.arguments, "bias": flat(20).clone()})
    assert (output.shape, output.stride(), output.dtype) == (want.shape, want.stride(), want.dtype)


def other_layout(tensor: Tensor, axis: int) -> Tensor:
    return tensor.transpose(0, axis).contiguous().transpose(0, axis)


CHANGES: dict[str, Callable[[Layer], object]] = {
    "numbers of the weight": lambda layer: layer["weight"].neg_().bitwise_not_(),
    "another weight": lambda layer: layer.arguments.update(weight=weights(*layer["weight"].shape, seed=1)),
    "memory of the weight": lambda layer: layer["weight"].set_(weights(*layer["weight"].shape, seed=2)),
    "layout of the weight": lambda layer: layer.arguments.update(weight=other_layout(layer["weight"], 1)),
    "numbers of the scale": lambda layer: layer["scale"].mul_(3),
    "another scale": lambda layer: layer.arguments.update(scale=scales(20, seed=1)),
    "dtype of the scale": lambda layer: layer.arguments.update(scale=scales(20).double()),
    "numbers of the bias": lambda layer: layer["bias"].mul_(3),
    "no bias": lambda layer: layer.arguments.update(bias=None),
    "bias of one number": lambda layer: layer.arguments.update(bias=torch.ones(1).expand(20)),
    "activation": lambda layer: layer.arguments.update(activation="silu"),
    "dtype": lambda layer: setattr(layer, "input", layer.input.bfloat16()),
    "shape": lambda layer: setattr(layer, "input", layer.input[:1]),
    "strides": lambda layer: setattr(layer, "input", other_layout(layer.input, -1)),
    "every other number": lambda layer: setattr(layer, "input", layer.input.repeat_interleave(2, -1)[..., ::2]),
    "a lazy minus sign": lambda layer: setattr(layer, "input", torch.complex(layer.input, layer.input).conj().imag),
}  # fmt: skip


@ops
@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_seen(op: str, change: str) -> None:
    layer = Layer(op)
    CHANGES[change](layer)
    torch.testing.assert_close(layer.twice(), layer.reference())
    assert torch.equal(layer(), layer.call(layer.input.clone(), **copy.deepcopy(layer.arguments)))


def test_the_input_scale_is_read_each_time() -> None:
    layer = Layer("static")
    layer["input_scale"].fill_(0.05)
    torch.testing.assert_close(layer.twice(), layer.reference())
    layer["input_scale"].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"int8_linear: input_scale must be positive and finite \(a layer with Static"):
        layer()
    layer.arguments["input_scale"] = None
    torch.testing.assert_close(layer.twice(), layer.reference())


@ops
@pytest.mark.parametrize("name", ["weight", "scale", "bias"])
def test_memory_that_is_smaller(op: str, name: str) -> None:
    """At the same address, through .data, which leaves no other trace."""
    layer = Layer(op)
    layer[name].data = layer[name].data[:3]
    with pytest.raises(ValueError, match="must have one number for each of"):
        layer()


@ops
def test_wrong_arguments_after_right_ones(op: str) -> None:
    layer = Layer(op)
    for name, wrong in (("weight", None), ("scale", 3.0), ("bias", "none"), ("activation", "tanh"), ("impl", "fast")):
        right = layer[name]
        layer.arguments[name] = wrong
        with pytest.raises((TypeError, ValueError), match=f"{name} must"):
            layer()
        layer.arguments[name] = right
    for wrong in (None, 3.0, layer.input.to_sparse(), layer.input.int(), layer.input.to("meta")):
        layer.input = wrong
        with pytest.raises((TypeError, ValueError), match=r"(input|weight) must"):
            layer()


def test_options_that_may_change_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("conv2d")
    layer.arguments["padding"] = padding = [1, 2]
    layer.twice()
    assert is_checked(layer, monkeypatch)
    padding[:] = 0, 0
    torch.testing.assert_close(layer.twice(), layer.reference())
    layer.arguments["padding"] = True
    with pytest.raises(TypeError, match="padding must be an integer"):
        layer()


@ops
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of forward mode
def test_gradients_and_transforms_are_refused_after_a_call(op: str) -> None:
    layer = Layer(op)
    with pytest.raises(RuntimeError, match="int8 layers do not run inside vmap"):
        torch.func.vmap(lambda _: layer())(torch.ones(3))
    with forward_ad.dual_level():
        layer.input = forward_ad.make_dual(layer.input, layer.input)
        with pytest.raises(RuntimeError, match="in forward mode either"):
            layer()
    layer.input = layer.input.clone().requires_grad_()
    with torch.no_grad():
        layer.twice()
    with pytest.raises(RuntimeError, match="there is no gradient through int8 layers"):
        layer().sum().backward()
    layer.input = layer.input.detach()
    layer["scale"].requires_grad_()
    with pytest.raises(RuntimeError, match="there is no gradient through int8 layers"):
        layer().sum().backward()


@ops
def test_residuals(op: str) -> None:
    layer = Layer(op)
    plain = layer()
    layer.arguments["residual"] = flat(*plain.shape, seed=3)
    torch.testing.assert_close(layer.twice(), layer.reference())
    layer.arguments["residual"] = None
    assert torch.equal(layer.twice(), plain)


@ops
def test_inputs_of_two_shapes_in_turn(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not replace each other: one of the two stays known."""
    layer = Layer(op)
    known, other = layer.input, layer.input[:1]
    for input in (other, known) * 3 + (other, other, other):
        layer.input = input
        torch.testing.assert_close(layer(), layer.reference())
    assert not is_checked(layer, monkeypatch), "three in a row"
    layer.input = known
    assert is_checked(layer, monkeypatch)
    layer.input = other
    assert not is_checked(layer, monkeypatch), "one miss replaced nothing"


def test_nothing_outlives_its_weight() -> None:
    gc.collect()
    before = len(_int8_again._last)
    layer = Layer("linear")
    assert len(_int8_again._last) == before + 1
    del layer.arguments["weight"]
    gc.collect()
    assert len(_int8_again._last) == before


@pytest.mark.parametrize("config", [Dynamic(), Static(), WeightOnly()], ids=lambda config: config.scheme)
def test_modules(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = Int8Linear.from_float(nn.Linear(12, 20), config), flat(6, 12)
    layers: list[tuple[Any, Tensor]] = [(linear, x)]
    if not isinstance(config, WeightOnly):
        conv = Int8Conv2d.from_float(nn.Conv2d(3, 8, 3, padding=1), config)
        image = flat(2, 3, 6, 6)
        layers += [(conv, image), (copy.deepcopy(conv), image.to(memory_format=torch.channels_last))]
    for layer, input in layers:
        if layer.input_scale is not None:
            layer.input_scale.fill_(0.03)
        first = layer(input)
        assert not is_checked(lambda layer=layer, input=input: layer(input), monkeypatch)
        assert torch.equal(layer(input), first)
        layer.to(torch.bfloat16)
        assert torch.equal(layer(input), first)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(input), first.bfloat16())
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(input), first)
