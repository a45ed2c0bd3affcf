"""Layers made int8 in place: which, how, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from int8_models import ConvNet, Transformer, ids, images, sqnr
from torch import Tensor, nn
from torch.nn.utils import prune

import fastkd
from fastkd.int8 import (
    Dynamic,
    Int8Conv2d,
    Int8Embedding,
    Int8Linear,
    Static,
    WeightOnly,
    calibrate,
    dequantize,
    quantize_,
)


def test_convolutions_with_their_norms() -> None:
    """A norm is folded where nothing else takes the convolution's output, and not before one."""
    model, x = ConvNet(), images()
    float_model = copy.deepcopy(model)
    done = quantize_(model)
    assert done.folded == {"stem_norm": "stem"}
    assert set(done.layers) == {"stem", "branch", "last", "head"}
    assert done.left == {}
    assert isinstance(model.stem, Int8Conv2d)
    assert model.stem.folded == "stem_norm"
    assert type(model.stem_norm) is nn.Identity
    assert type(model.branch_norm) is nn.BatchNorm2d
    with torch.no_grad():
        assert sqnr(model(x), float_model(x)) > 30


def test_tied_weights_are_rounded_once() -> None:
    model, x = Transformer(), ids()
    float_model = copy.deepcopy(model)
    done = quantize_(model)
    assert done.left == {}
    assert isinstance(model.embed, Int8Embedding)
    assert isinstance(model.head, Int8Linear)
    assert model.embed.weight is model.head.weight
    assert model.embed.scale is model.head.scale
    with torch.no_grad():
        assert sqnr(model(x), float_model(x)) > 25


def test_one_module_in_two_places_and_hooks() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)}).eval()
    seen = []
    handle = shared.register_forward_hook(lambda module, args, output: seen.append(output))
    done = quantize_(model, filter_fn=lambda module, name: name != "c")
    assert done.layers == {"a": "dynamic"}
    assert done.left == {"c": "filter_fn leaves it out"}
    assert type(shared) is Int8Linear
    assert model["b"][0] is shared
    shared(torch.randn(2, 4))
    handle.remove()
    shared(torch.randn(2, 4))
    assert len(seen) == 1


def test_the_root_itself() -> None:
    layer = nn.Linear(4, 3).eval()
    done = quantize_(layer)
    assert done.layers == {"": "dynamic"}
    assert type(layer) is Int8Linear
    assert not layer.training


def test_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    quantize_(model)
    before = model[0].weight
    done = quantize_(model, Static())
    assert done.layers == {}
    assert done.left == {"0": "it is int8 already"}
    assert model[0].weight is before


class MyLinear(nn.Linear):
    pass


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_has_no_int8_form_is_said() -> None:
    linear, embedding, bag = nn.Linear(4, 4), nn.Embedding(4, 4, max_norm=1.0), nn.EmbeddingBag(4, 4)
    normed = nn.utils.spectral_norm(nn.Linear(4, 4))
    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    complex_layer = nn.Linear(4, 4)
    complex_layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    patched = nn.Linear(4, 4)
    patched.forward = patched.forward  # type: ignore[method-assign]
    modules: dict[str, Any] = {
        "linear": linear,
        "subclass": MyLinear(4, 4),
        "embedding": embedding,
        "bag": bag,
        "normed": normed,
        "parametrized": parametrized,
        "patched": patched,
        "lstm": nn.LSTM(4, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "norm": nn.LayerNorm(4),
        "transposed": nn.ConvTranspose2d(4, 4, 1),
        "empty": nn.Linear(4, 0),
        "complex": complex_layer,
    }
    model = nn.ModuleDict(modules).eval()
    done = quantize_(model)
    assert done.layers == {"linear": "dynamic"}
    assert done.left == {
        "subclass": "MyLinear has no int8 form",
        "embedding": "max_norm changes its weight as it runs",
        "bag": "EmbeddingBag has no int8 form",
        "normed": "its weight is computed by a hook",
        "parametrized": "it is parametrized (torch.nn.utils.parametrize.remove_parametrizations ends that)",
        "parametrized.parametrizations.weight": "ParametrizationList has no int8 form",
        "patched": "its forward is patched",
        "lstm": "LSTM has no int8 form",
        "attention": "MultiheadAttention has no int8 form",
        "attention.out_proj": "NonDynamicallyQuantizableLinear has no int8 form",
        "transposed": "ConvTranspose2d has no int8 form",
        "empty": "its weight is empty",
        "complex": "its weight is torch.complex64, torch.strided",
    }


def test_configs_by_name() -> None:
    model = Transformer()
    rules: Any = {"head": None, "blocks.0.*": WeightOnly(skip="*.mix"), "embed": None, "*": Static()}
    done = quantize_(model, rules)
    assert {done.layers[f"blocks.0.{name}"] for name in ("query", "key", "value", "wide", "narrow")} == {"weight only"}
    assert {done.layers[f"blocks.1.{name}"] for name in ("query", "mix", "narrow")} == {"static"}
    assert done.left == dict.fromkeys(("embed", "head", "blocks.0.mix"), "its name is skipped")
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("config", [Dynamic(), Static(), WeightOnly()], ids=lambda config: type(config).__name__)
def test_loading_into_a_fresh_model(config: Any) -> None:
    model, x = ConvNet(), images()
    quantize_(model, config, example=x)
    fresh = ConvNet()
    quantize_(fresh, config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("assign", [False, True])
def test_meta(assign: bool) -> None:
    model, x = ConvNet(), images()
    quantize_(model)
    fresh = ConvNet().to("meta")
    assert quantize_(fresh).folded == {"stem_norm": "stem"}
    assert all(tensor.is_meta for tensor in fresh.state_dict().values())
    if not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_pruned_weights_stay_zero() -> None:
    """Of a model in the middle of pruning, and of one whose pruning was made permanent."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)).eval()
    for layer in model:
        prune.l1_unstructured(layer, "weight", 0.6)
    prune.l1_unstructured(model[2], "bias", 0.5)
    prune.remove(model[2], "weight")
    zeros = [layer.weight == 0 for layer in model]
    wanted = [layer.weight.detach().clone() for layer in model]
    bias = model[2].bias.detach().clone()
    model[0].weight_orig.data += 0.01  # as after a step of training: what is masked follows at the next call
    wanted[0] = (model[0].weight_orig * model[0].weight_mask).detach()
    quantize_(model)
    for layer, zero, want in zip(model, zeros, wanted, strict=True):
        assert zero.float().mean() > 0.55
        assert (layer.weight[zero] == 0).all()
        assert torch.allclose(layer.float_weight(), want, atol=float(want.abs().max()) / 250)
        assert not layer._forward_pre_hooks
    assert torch.equal(model[2].bias, bias)
    model[0](torch.randn(2, 16))
    assert (dequantize(model)[0].weight[zeros[0]] == 0).all()  # type: ignore[index]


def test_layers_that_lose_too_much_stay_float() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64)).eval()
    model[0].weight.data[:, 0] *= 3000  # one weight in a row takes all the steps, and its input is nearly always 0
    x = torch.randn(32, 64)
    x[:, 0] = 1e-5
    float_model = copy.deepcopy(model)
    done = quantize_(copy.deepcopy(model), example=x)
    assert set(done.layers) == {"0", "1"}
    done = quantize_(model, example=(x,), min_sqnr=30)
    assert set(done.layers) == {"1"}
    assert done.left["0"].startswith("its SQNR is ")
    assert type(model[0]) is nn.Linear
    with torch.no_grad():
        assert sqnr(model(x), float_model(x)) > 30
    unused = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)}).eval()
    unused.forward = lambda x: unused["used"](x)  # type: ignore[method-assign]
    done = quantize_(unused, example=torch.randn(3, 4), min_sqnr=10)
    assert done.left == {"unused": "the example does not reach it"}


def test_a_folded_norm_is_no_loss() -> None:
    done = quantize_(ConvNet(), example=images(), min_sqnr=25)
    assert done.left == {}
    assert done.folded == {"stem_norm": "stem"}


def test_an_example_calibrates() -> None:
    model, x = Transformer(), ids()
    float_model = copy.deepcopy(model)
    other = copy.deepcopy(model)
    quantize_(model, Static(), example={"ids": x})
    with torch.no_grad():
        assert sqnr(model(x), float_model(x)) > 20
        quantize_(other, Static())
        with calibrate(other):
            other(x)
    # The inputs of the float model, against those that int8 layers before have rounded.
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        if name.endswith("input_scale"):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0)


def test_dequantize() -> None:
    model, x = ConvNet(), images()
    quantize_(model, WeightOnly())
    floating: Any = dequantize(model)
    assert isinstance(model.stem, Int8Conv2d)
    assert type(floating.stem) is nn.Conv2d
    assert type(floating.head) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(floating(x), model(x), rtol=1e-5, atol=1e-5)
    again = quantize_(floating, WeightOnly())
    assert "stem" in again.layers
    for name in ("stem", "branch", "last", "head"):
        assert torch.equal(floating.get_submodule(name).weight, model.get_submodule(name).weight)
    tied = Transformer().bfloat16()
    quantize_(tied)
    back: Any = dequantize(tied)
    assert back.head.weight is back.embed.weight
    assert back.head.weight.dtype is torch.bfloat16
    assert back.head.weight.requires_grad
    same = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", stride=1, groups=2)).eval()
    before = repr(same)
    quantize_(same)
    assert repr(dequantize(same)) == before


def test_an_int8_teacher() -> None:
    """Its logits are a teacher's like any other, and close to those of the float teacher."""
    teacher, student, x = Transformer(), Transformer(depth=1), ids()
    with torch.no_grad():
        want = fastkd.kd_loss(student(x), teacher(x))
        quantize_(teacher)
        taught = teacher(x)
    student.train()
    loss = fastkd.kd_loss(student(x), taught)
    loss.backward()
    torch.testing.assert_close(loss.detach(), want, rtol=0.05, atol=1e-3)
    assert all(parameter.grad is not None for parameter in student.parameters())

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    hidden, head = copy.deepcopy(teacher), teacher.head
    hidden.head = Hidden()
    with torch.no_grad():
        states = hidden(x)
    of_head = fastkd.kd_loss(student(x), fastkd.Head(states, head.float_weight(), head.bias))
    torch.testing.assert_close(of_head.detach(), loss.detach(), rtol=0.02, atol=1e-3)
