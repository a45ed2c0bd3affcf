"""Outliers moved into weights: the same function, easier to round, and only where that is sound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_models import Transformer, ids, randomize, sqnr
from torch import Tensor, nn

from fastkd.int8 import quantize_, smooth


def unchanged(model: nn.Module, example: Any, *args: Tensor) -> dict[str, tuple[str, ...]]:
    """The pairs, after a check that the function of the model is what it was, in float64."""
    with torch.no_grad():
        before = model(*args)
        weights = [parameter.clone() for parameter in model.parameters()]
        pairs = smooth(model, example)
        after = model(*args)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-12)
    changed = sum(not torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert changed >= 2 * len(pairs)
    return pairs


def test_the_formula() -> None:
    """Of the paper, written down by itself."""
    norm, a, b = nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(6, 3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = norm, a, b

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return torch.cat([self.a(y), self.b(y)], -1)

    model, x = Both(), torch.randn(4, 7, 6)
    randomize(model)
    with torch.no_grad():
        a.weight[:, 3] = b.weight[:, 3] = 0  # nothing to divide by
        norm.weight[4] = norm.bias[4] = 0
        activation = norm(x).abs().amax((0, 1))
        weight = torch.cat([a.weight, b.weight]).abs().amax(0)
        s = activation**0.3 / weight**0.7
        s[3] = s[4] = 1
        want = [norm.weight / s, norm.bias / s, a.weight * s, b.weight * s]
        before = model(x)
    assert smooth(model, x, alpha=0.3) == {"norm": ("a", "b")}
    for got, wanted in zip((norm.weight, norm.bias, a.weight, b.weight), want, strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach())
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        torch.testing.assert_close(norm(x).abs().amax((0, 1))[:3], a.weight.new_tensor((activation / s)[:3].tolist()))


def test_a_transformer() -> None:
    """The head shares its weight with the embedding, and stays."""
    model, x = Transformer().double(), ids()
    pairs = unchanged(model, x, x)
    assert pairs == {
        "blocks.0.norm": ("blocks.0.query", "blocks.0.key", "blocks.0.value"),
        "blocks.0": ("blocks.0.wide",),
        "blocks.1.norm": ("blocks.1.query", "blocks.1.key", "blocks.1.value"),
        "blocks.1": ("blocks.1.wide",),
    }


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "ViT"])
def test_models_of_huggingface(family: str) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    if family == "ViT":
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
        model: Any = transformers.ViTForImageClassification(config).double()
        example: Any = {"pixel_values": torch.randn(2, 3, 32, 32).double()}
        want = {"vit.layers.0.layernorm_before": 3, "vit.layers.0.layernorm_after": 1, "vit.layernorm": 1}
    else:
        config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=97, num_key_value_heads=2)
        model = getattr(transformers, f"{family}ForCausalLM")(config).double()
        example = {"input_ids": torch.randint(97, (2, 9))}
        want = {"model.layers.0.input_layernorm": 3, "model.layers.0.post_attention_layernorm": 2, "model.norm": 1}
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_()
    before = model(**example).logits
    pairs = smooth(model, example)
    torch.testing.assert_close(model(**example).logits, before, rtol=1e-9, atol=1e-11)
    assert {name: len(linears) for name, linears in pairs.items()} == want


class Net(nn.Module):
    """A norm, two linear layers, and a way from one to the other."""

    def __init__(self, way: Callable[[Any, Tensor], Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6) if norm is None else norm
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gain, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.way = way
        randomize(self)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


SOUND: dict[str, Callable[[Any, Tensor], Any]] = {
    "slice of rows": lambda net, x: net.linear(net.norm(x)[:, 0]),
    "transposed rows": lambda net, x: net.linear(net.norm(x).transpose(0, 1)),
    "flattened": lambda net, x: net.linear(net.norm(x).flatten(0, 1).contiguous().to(x.dtype)),
    "dropout that does nothing": lambda net, x: net.linear(F.dropout(net.norm(x), 0.5, training=net.training)),
    "a gain": lambda net, x: net.linear(net.gain * (x / x.std())),
    "a gain and a shift": lambda net, x: net.linear((x / x.std()) * net.gain + net.shift),
    "rms norm": lambda net, x: net.linear(F.rms_norm(x, (6,), net.gain)),
    "its shape is read": lambda net, x: net.linear(net.norm(x)) * net.norm.weight.shape[0],
}


@pytest.mark.parametrize("name", SOUND)
def test_ways_that_are_sound(name: str) -> None:
    model, x = Net(SOUND[name]).double(), torch.randn(3, 4, 6).double()
    (linears,) = unchanged(model, x, x).values()
    assert linears == ("linear",)


class Through(torch.autograd.Function):
    """Looks at numbers where no torch function is called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def kept(net: Any, x: Tensor) -> Any:
    y = net.norm(x)
    return {"logits": net.linear(y), "features": [y]}


UNSOUND: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "norm called twice": (lambda net, x: net.linear(net.norm(x)) + net.norm(x), "norm, whose weight is used elsewhere"),
    "a sum takes it too": (lambda net, x: (lambda y: net.linear(y) + y)(net.norm(x)), "whose output add takes too"),
    "in place": (lambda net, x: net.linear(net.norm(x).relu_()), "whose output relu_ takes too"),
    "after a while in place": (lambda net, x: (lambda y: (net.linear(y), y.mul_(2))[0])(net.norm(x)), "takes too"),
    "returned": (kept, "whose output the model returns or shows to a hook"),
    "returned, a view": (lambda net, x: (lambda y: (net.linear(y), y[:1]))(net.norm(x)), "the model returns or shows"),
    "channels moved": (lambda net, x: net.linear(net.norm(x).flip(-1)), "whose output flip takes too"),
    "channels transposed": (lambda net, x: net.linear(net.norm(x[:, :1].expand(3, 6, 6)).mT), "takes too"),
    "rolled by a view": (lambda net, x: net.linear(net.norm(x)[..., [1, 0, 2, 3, 4, 5]]), "takes too"),
    "dropout": (lambda net, x: net.linear(F.dropout(net.norm(x), 0.5, training=True)), "whose output dropout takes"),
    "numpy": (lambda net, x: (lambda y: net.linear(y) + float(y.numpy().sum()))(net.norm(x)), "numpy takes too"),
    "a custom function": (lambda net, x: (lambda y: net.linear(y) + Through.apply(y))(net.norm(x)), "takes too"),
    "shared weight": (lambda net, x: net.linear(net.norm(x)) @ net.linear.weight, "whose output linear takes too"),
    "called twice": (lambda net, x: net.linear(net.linear(net.norm(x))), "whose output linear takes too"),
    "no linear layer": (lambda net, x: net.norm(x).sum(), "whose output sum takes too"),
    "no norm": (lambda net, x: net.linear(x), "one without any norm that has a weight per channel"),
    "softmax": (lambda net, x: net.linear(net.norm(x).softmax(-1)), "whose output softmax takes too"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_ways_that_are_not(name: str) -> None:
    way, reason = UNSOUND[name]
    model, x = Net(way), torch.randn(3, 4, 6)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="smooth: model must have a norm whose output only linear layers take"
    ) as raised:
        smooth(model, x)
    assert reason in str(raised.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_hook_sees_the_norm() -> None:
    model, x = Net(lambda net, x: net.linear(net.norm(x))), torch.randn(3, 4, 6)
    handle = model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="norm, whose output the model returns or shows to a hook"):
        smooth(model, x)
    handle.remove()
    assert smooth(model, (x,))


def test_norms_without_a_weight() -> None:
    model = Net(lambda net, x: net.linear(net.norm(x)), nn.LayerNorm(6, elementwise_affine=False))
    with pytest.raises(ValueError, match="one without any norm that has a weight per channel"):
        smooth(model, torch.randn(3, 4, 6))
    model = Net(lambda net, x: net.linear(net.norm(x)), nn.LayerNorm(6, bias=False)).double()
    x = torch.randn(3, 4, 6).double()
    assert unchanged(model, x, x) == {"norm": ("linear",)}


def test_it_helps() -> None:
    """Channels a hundred times larger than the others, as language models have them."""
    model, x = Transformer(width=64), ids(8, 12)
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight[::17] *= 100
            block.gain[::13] *= 100
            for layer in (block.query, block.key, block.value):
                layer.weight[:, ::17] /= 100
            block.wide.weight[:, ::13] /= 100
    results = []
    for alpha in (None, 0.5):
        rounded = copy.deepcopy(model)
        if alpha is not None:
            smooth(rounded, x, alpha)
        quantize_(rounded)
        with torch.no_grad():
            results.append(sqnr(rounded(x), model(x)))
    assert results[1] > results[0] + 3


def test_half_precision_and_empty_batches() -> None:
    model, x = Net(lambda net, x: net.linear(net.norm(x))).bfloat16(), torch.randn(3, 4, 6).bfloat16()
    with torch.no_grad():
        before = model(x)
        assert smooth(model, x)
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)
        weights = copy.deepcopy(model.state_dict())
        smooth(model, x[:0])  # nothing was seen: nothing is scaled
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_refused() -> None:
    model, x = Net(lambda net, x: net.linear(net.norm(x))), torch.randn(3, 6)
    with pytest.raises(TypeError, match=r"smooth: model must be a torch\.nn\.Module, got int"):
        smooth(3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"smooth: model must be in evaluation mode \(call eval\(\)\)"):
        smooth(copy.deepcopy(model).train(), x)
    with pytest.raises(ValueError, match=r"smooth: alpha must be from 0 to 1, got 1\.5"):
        smooth(model, x, 1.5)
    with pytest.raises(ValueError, match="smooth: example must be finite behind norm, got NaN or infinity"):
        smooth(model, x * torch.inf)
    model.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="smooth: model must be finite behind norm, got NaN or infinity"):
        smooth(model, x)
    model.linear.weight.data[0, 0] = 0
    quantize_(model)
    with pytest.raises(ValueError, match=r"got norm, whose output \w+ takes too"):
        smooth(model, x)  # before quantize_, or not at all
