"""Rounding with a gradient, and training with the numbers that int8 layers will have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_models import ConvNet, Transformer, ids, images
from torch import Tensor, nn
from torch.nn.utils import prune

import fastkd
from fastkd import _int8_operators
from fastkd.int8 import (
    Dynamic,
    Int8Conv2d,
    Int8Embedding,
    Int8Linear,
    Static,
    WeightOnly,
    calibrate,
    fake_quantize,
    prepare_qat_,
    quantize_,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def with_gradient(x: Tensor, scale: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = fake_quantize(leaf, scale)
    upstream = torch.arange(1.0, 1 + x.numel(), dtype=torch.float64).reshape(x.shape).to(x.dtype)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    torch.testing.assert_close(
        grad, torch.where((x.double() / scale).round().abs() <= 127, upstream, 0), rtol=0, atol=0
    )
    return value.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_quantize(dtype: torch.dtype) -> None:
    """Every value is the multiple of the scale that is nearest, of those that int8 has."""
    x = (torch.randn(50, 40) * 40).to(dtype)
    for scale in (0.25, torch.tensor(0.25), torch.full((50, 1), 0.25), torch.full((40,), 0.25, dtype=torch.float64)):
        value, grad = with_gradient(x, scale)
        assert value.dtype is grad.dtype is dtype
        want = (x.double() / 0.25).round().clamp(-127, 127) * 0.25
        assert torch.equal(value.double(), want)
        assert 0.2 < (grad == 0).double().mean() < 0.8


def test_ties_and_the_ends() -> None:
    """Half goes to even; the clamp begins where a number would round to 128."""
    x = torch.tensor([0.5, 1.5, -2.5, 127.49, 127.5, -127.5, 128.0, -0.0])
    value, grad = with_gradient(x, 1.0)
    assert value.tolist() == [0, 2, -2, 127, 127, -127, 127, 0]
    assert (grad != 0).tolist() == [True, True, True, True, False, False, False, True]


def test_the_largest_magnitude_is_never_outside() -> None:
    """amax / 127 * 127 may be less than amax: its gradient counts all the same."""
    x = torch.rand(1000, 3) + 0.5
    scale = x.amax(1, keepdim=True) / torch.tensor(127.0)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, scale).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 1).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, torch.zeros(4)], ids=str)
def test_what_is_not_finite(scale: Any) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]], requires_grad=True)
    value = fake_quantize(x, scale)
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0, 1]]
    end = 127 * float(torch.as_tensor(scale).max())
    assert value[0, [0, 1, 3]].tolist() == [end, -end, 0]
    assert value[0, 2].isnan()
    assert fake_quantize(x.detach()[:, 3:], torch.tensor(torch.nan)).isnan()


def test_layouts_and_batches_of_nothing() -> None:
    x = torch.randn(6, 5).T
    assert torch.equal(fake_quantize(x, 0.1), fake_quantize(x.contiguous(), 0.1))
    assert fake_quantize(torch.zeros(0, 3, requires_grad=True), 0.1).shape == (0, 3)
    assert fake_quantize(torch.tensor(0.26), 0.25) == 0.25


def test_compiled_and_vectorised() -> None:
    x, scale = torch.randn(5, 4), torch.rand(5, 1)
    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = compiled(leaf, scale), fake_quantize(other, scale)
    (got * x).sum().backward()
    (want * x).sum().backward()
    assert torch.equal(got, want)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=0)
    assert torch.equal(torch.func.vmap(fake_quantize)(x, scale), want)
    slope = torch.func.grad(lambda value: fake_quantize(value, 0.25).sum())(x)
    assert (slope == 1).all()
    with torch.inference_mode():
        assert torch.equal(fake_quantize(x, scale), want)
    assert not fake_quantize(x, scale).requires_grad


REFUSED: dict[str, tuple[type[Exception], str, Any, Any]] = {
    "x": (TypeError, "fake_quantize: x must be a tensor, got int", 3, 1.0),
    "dtype": (
        TypeError,
        "fake_quantize: x must be float16, bfloat16, float32 or float64, got torch.int8",
        torch.zeros(2, dtype=torch.int8),
        1.0,
    ),
    "negative": (ValueError, "fake_quantize: scale must be finite and not negative, got -1.0", torch.zeros(2), -1.0),
    "nan": (ValueError, "fake_quantize: scale must be finite and not negative, got nan", torch.zeros(2), float("nan")),
    "type": (TypeError, "fake_quantize: scale must be a number, got str", torch.zeros(2), "1"),
    "gradient": (
        ValueError,
        "fake_quantize: scale must not require a gradient (it would get none): pass argument.detach(), got "
        "requires_grad=True",
        torch.zeros(2),
        torch.ones(1, requires_grad=True),
    ),
    "shape": (
        ValueError,
        "fake_quantize: scale must broadcast to the shape of x, (2, 3), got (2,)",
        torch.zeros(2, 3),
        torch.ones(2),
    ),
    "larger": (
        ValueError,
        "fake_quantize: scale must broadcast to the shape of x, (3,), got (2, 3)",
        torch.zeros(3),
        torch.ones(2, 3),
    ),
    "device": (
        ValueError,
        "fake_quantize: scale must be on the device of x, cpu, got meta",
        torch.zeros(3),
        torch.ones(3, device="meta"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, message, x, scale = REFUSED[case]
    with pytest.raises(error) as raised:
        fake_quantize(x, scale)
    assert str(raised.value) == message


def prepared(model: nn.Module, config: Any, x: Tensor) -> nn.Module:
    assert prepare_qat_(model, config) == {}
    if isinstance(config, Static):
        with torch.no_grad(), calibrate(model.eval()):
            model(x)
    return model


@pytest.mark.native
@pytest.mark.parametrize("config", [Dynamic(), Static(), WeightOnly()], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("kind", [ConvNet, Transformer])
def test_int8_computes_what_was_trained_with(
    kind: type[nn.Module], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, for the same inputs: the same steps of weights and inputs, up to the rounding of sums."""
    model, x = kind(), images() if kind is ConvNet else ids()
    prepared(model, config, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        (output * torch.randn_like(output)).sum().backward()
        optimizer.step()
    model.eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0].clone(), output.clone()

        return hook

    layers = {name: m for name, m in model.named_modules() if type(m).__name__.startswith("FakeQuantized")}
    assert layers
    handles = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    norms = {
        name: copy.deepcopy(module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    done = quantize_(model)
    assert set(done.layers) == set(layers)
    assert {done.layers[name] for name in layers if name != "embed"} == {config.scheme}
    with torch.no_grad():
        for name, (input, trained) in seen.items():
            module: Any = model.get_submodule(name)
            folded = getattr(module, "folded", None)
            want = norms[folded](trained) if folded else trained
            size = float(want.abs().max())
            torch.testing.assert_close(module(input), want, rtol=0, atol=3e-6 * size)
    if kind is ConvNet:
        assert done.folded == {"stem_norm": "stem"}


@pytest.mark.native
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("config", [Dynamic(), Static()], ids=lambda config: type(config).__name__)
def test_rows_and_images_that_are_not_finite(config: Any, bad: float) -> None:
    """NaN in training where they are NaN in int8, and nowhere else."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(2), nn.Linear(9, 4))
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 9)
    prepared(model, config, x)
    conv, _, linear = (copy.deepcopy(layer) for layer in model)
    quantize_(model.eval())
    x[1, 0, 3, 3] = y[1, 2, 0] = bad
    for trained, int8, input in ((conv, model[0], x), (linear, model[2], y)):
        leaf = input.clone().requires_grad_()
        with torch.no_grad():
            want = int8(input)
        got = trained(leaf)
        assert want.isnan().any()
        torch.testing.assert_close(got.detach(), want, equal_nan=True, rtol=1e-5, atol=1e-5)
        got.nansum().backward()
        assert leaf.grad is not None
        assert leaf.grad[::2].isfinite().all()


def test_layers_and_gradients() -> None:
    """Against the formula by hand; the gradient is that of the rounded numbers, handed straight through."""
    layer = nn.Linear(5, 4)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(3, 5)

    def rounded(values: Tensor) -> Tensor:
        scale = values.abs().amax(-1, keepdim=True) / torch.tensor(127.0)
        return (values / scale).round() * scale

    assert prepare_qat_(layer) == {}
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.state_dict()) == ["weight", "bias"]
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    torch.testing.assert_close(output, F.linear(rounded(x), rounded(weight), bias))
    upstream = torch.randn_like(output)
    output.backward(upstream)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ rounded(x))
    torch.testing.assert_close(leaf.grad, upstream @ rounded(weight))
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_embeddings_of_chosen_rows() -> None:
    layer = nn.Embedding(9, 4, sparse=True)
    weight = layer.weight.detach().clone()
    prepare_qat_(layer)
    chosen = torch.tensor([3, 3, 8])
    scale = weight.abs().amax(1, keepdim=True) / torch.tensor(127.0)
    output = layer(chosen)
    torch.testing.assert_close(output.detach(), ((weight / scale).round() * scale)[chosen])
    output.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_sparse
    assert layer.weight.grad.to_dense()[:, 0].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 1]


def test_distillation_with_rounded_numbers() -> None:
    """A student that is trained as int8 comes closer to its teacher, as int8, than one that is rounded afterwards."""
    teacher, x = Transformer(depth=1), ids(64, 6)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher.blocks[0].wide.weight[0] *= 3
        taught = teacher(x)
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean())
            parameter[..., :1] *= 12  # which rounds the rest badly
    losses = []
    for qat in (False, True):
        torch.manual_seed(0)
        model = copy.deepcopy(student).train()
        if qat:
            prepare_qat_(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            fastkd.kd_loss(model(x), taught).backward()
            optimizer.step()
        quantize_(model.eval())
        with torch.no_grad():
            losses.append(float(fastkd.kd_loss(model(x), taught)))
    assert losses[1] < losses[0]


def test_pruned_weights_stay_zero_in_training() -> None:
    layer = nn.Linear(16, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    zero = layer.weight == 0
    prepare_qat_(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    quantize_(layer.eval())
    assert type(layer) is Int8Linear
    assert zero.float().mean() == 0.5
    assert (layer.weight[zero] == 0).all()
    assert (layer.weight[~zero] != 0).float().mean() > 0.9


def test_what_stays_as_it_is() -> None:
    """Tied parameters, hooks, an optimizer's parameters, state dicts."""
    model: Any = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    left = prepare_qat_(model, {"blocks.1.*": None, "*": Dynamic()})
    assert left == {
        f"blocks.1.{name}": "its name is skipped" for name in ("query", "key", "value", "mix", "wide", "narrow")
    }
    assert model.head.weight is model.embed.weight
    model.load_state_dict(state)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert (
        prepare_qat_(nn.Sequential(copy.deepcopy(model), nn.Linear(4, 4)))["0.head"]
        == "FakeQuantizedLinear has no int8 form"
    )
    quantize_(model.eval())
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed, Int8Embedding)
    with pytest.raises(
        ValueError, match="prepare_qat_: model must have a layer that may become int8, got none with weights"
    ):
        prepare_qat_(nn.ReLU())
    with pytest.raises(TypeError, match=r"prepare_qat_: model must be a torch\.nn\.Module, got int"):
        prepare_qat_(3)  # type: ignore[arg-type]


def test_copied_compiled_and_unbatched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(-2), nn.Linear(16, 3))
    prepare_qat_(model)
    x = torch.randn(2, 3, 4, 4)
    want = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    torch.testing.assert_close(model(x[0]), want[0])
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    assert model(x[:0]).shape == (0, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype is torch.bfloat16
    quantize_(model.eval())
    assert isinstance(model[0], Int8Conv2d)
    assert _int8_operators.LIBRARY is not None
