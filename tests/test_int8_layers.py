"""The int8 layers themselves: their numbers, their buffers, and where people take them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_models import Transformer, ids, rounded, rounded_slices
from torch import Tensor, nn

from fastkd._int8 import quantize, quantize_channels
from fastkd.int8 import Dynamic, Int8Conv2d, Int8Embedding, Int8Linear, Static, WeightOnly, quantize_

CONFIGS = [Dynamic(), Static(), WeightOnly()]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# How far the last rounding is from the float64 formula, which has none.
BAR = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-6, torch.float64: 1e-6}
SHAPES = [(5, 9), (2, 3, 9), (9,), (0, 9), (2, 0, 9), (1, 9)]
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "bias": False},
    "dilated groups": {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, uneven": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 1, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
}


def named(config: object) -> str:
    return type(config).__name__


def known(layer: Any, input: Tensor) -> Any:
    """With a scale that clips a little."""
    if layer.input_scale is not None:
        layer.input_scale.fill_(0.7 * float(input.abs().amax()) / 127 if input.numel() else 1.0)
    return layer


def as_seen(layer: Any, input: Tensor, ndim: int) -> Tensor:
    if isinstance(layer.config, WeightOnly):
        return input.double()
    return rounded_slices(input, ndim) if layer.input_scale is None else rounded(input, layer.input_scale)


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(
        got.double(), want, rtol=0, atol=BAR[got.dtype] * float(want.abs().max().nan_to_num(1) if want.numel() else 1)
    )


@pytest.mark.native
@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, ...], config: Any) -> None:
    layer, input = nn.Linear(9, 6), torch.randn(shape)
    made = known(Int8Linear.from_float(layer, config), input)
    weight = rounded_slices(layer.weight.detach(), 1)
    close(made(input), F.linear(as_seen(made, input, 1), weight, layer.bias.detach().double()))
    torch.testing.assert_close(made.float_weight().double(), weight, rtol=1e-7, atol=0)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_dtypes_in_and_out(config: Any, dtype: torch.dtype) -> None:
    layer, input = nn.Linear(9, 6), torch.randn(5, 9).to(dtype)
    made = known(Int8Linear.from_float(layer, config), input)
    output = made(input)
    assert output.dtype is dtype
    want = F.linear(as_seen(made, input, 1), rounded_slices(layer.weight.detach(), 1), layer.bias.detach().double())
    close(output, want)
    conv, image = nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 5).to(dtype)
    assert known(Int8Conv2d.from_float(conv, config), image)(image).dtype is dtype


@pytest.mark.native
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the float layer says it
@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name: str, config: Any) -> None:
    layer = nn.Conv2d(4, 8, **CONVOLUTIONS[name])
    input = torch.randn(3, 4, 9, 8)
    made = known(Int8Conv2d.from_float(layer, config), input)
    exact = copy.deepcopy(layer).double()
    exact.weight.data = rounded_slices(layer.weight.detach(), 3)
    for x in (input, input.to(memory_format=torch.channels_last), input[:0], input.transpose(2, 3).contiguous().mT):
        close(made(x), exact(as_seen(made, x, 3)).detach())
    close(made(input[0]), exact(as_seen(made, input[:1], 3))[0].detach())


@pytest.mark.native
def test_embedding() -> None:
    layer, ids = nn.Embedding(11, 6, padding_idx=2), torch.tensor([[0, 10], [2, 3]])
    made = Int8Embedding.from_float(layer)
    close(made(ids), rounded_slices(layer.weight.detach(), 1)[ids])
    assert made(ids[:0]).shape == (0, 2, 6)
    assert made.half()(ids).dtype is torch.float16


def test_layouts_of_weights() -> None:
    """Transposed, channels_last, strided, in any dtype: the same numbers."""
    linear, conv = nn.Linear(6, 8), nn.Conv2d(4, 6, 3)
    want, want_conv = Int8Linear.from_float(linear), Int8Conv2d.from_float(conv)
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for made, same in ((Int8Linear.from_float(linear), want), (Int8Conv2d.from_float(conv), want_conv)):
        assert made.weight.is_contiguous()
        assert torch.equal(made.weight, same.weight)
        assert torch.equal(made.scale, same.scale)
    assert Int8Linear.from_float(nn.Linear(6, 8).bfloat16()).scale.dtype is torch.float32


def test_a_row_of_zeros() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data[1] = 0
    made = Int8Linear.from_float(layer)
    assert made.scale[1] == 0
    assert torch.equal(made(torch.zeros(2, 4)), layer.bias.detach().expand(2, 3))
    assert (made(torch.randn(2, 4))[:, 1] == layer.bias[1]).all()


def tied() -> nn.Module:
    model = Transformer(depth=1)
    quantize_(model)
    return model


def same(model: nn.Module, other: nn.Module, input: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model(input), other(input))
    for (name, a), (other_name, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


def test_state_is_plain_buffers() -> None:
    model = tied()
    assert not list(model.blocks[0].mix.parameters())
    kinds = {name: str(tensor.dtype) for name, tensor in model.state_dict().items() if "mix" in name or "embed" in name}
    assert kinds == {
        "embed.weight": "torch.int8",
        "embed.scale": "torch.float32",
        "blocks.0.mix.weight": "torch.int8",
        "blocks.0.mix.scale": "torch.float32",
        "blocks.0.mix.bias": "torch.float32",
    }
    assert all(type(tensor) is Tensor for tensor in model.state_dict().values())


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, fresh, input = tied(), tied(), ids()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    same(model, fresh, input)
    assert fresh.head.weight is fresh.embed.weight


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model, save_file, save_model

    layer = nn.Sequential(Int8Linear.from_float(nn.Linear(4, 3), Static()), Int8Conv2d.from_float(nn.Conv2d(2, 3, 3)))
    save_file(layer.state_dict(), tmp_path / "layers.safetensors")
    loaded = load_file(tmp_path / "layers.safetensors")
    assert {name: x.dtype for name, x in loaded.items()} == {name: x.dtype for name, x in layer.state_dict().items()}
    model, fresh, input = tied(), tied(), ids()
    save_model(model, str(tmp_path / "model.safetensors"))  # shared weights are stored once
    load_model(fresh, str(tmp_path / "model.safetensors"))
    same(model, fresh, input)


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, input = tied(), ids()
    with torch.no_grad():
        model(input)  # whatever a kernel caches is not copied
    other: Any = duplicate(model)
    same(model, other, input)
    assert other.head.weight is other.embed.weight
    assert other.head.weight is not model.head.weight


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "type", "to_and_back"])
def test_a_cast_leaves_the_numbers(cast: str) -> None:
    """Scales in half precision would change every weight; shared weights stay shared."""
    model: Any = tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "norm" not in name}
    if cast == "type":
        model.type(torch.bfloat16)
    elif cast == "to_and_back":
        model.to(torch.bfloat16).float()
    else:
        getattr(model, cast)()
    after = model.state_dict()
    for name, tensor in before.items():
        if name.endswith("gain"):
            continue
        assert after[name].dtype is tensor.dtype
        assert torch.equal(after[name], tensor)
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        assert model(ids()).dtype is model.norm.weight.dtype


def test_moving_keeps_shared_weights_shared() -> None:
    model: Any = tied()
    model.to("meta")
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.is_meta
    model.to_empty(device="cpu")
    assert model.head.weight is model.embed.weight
    model.load_state_dict(tied().state_dict())

    def convert(tensor: Tensor) -> Tensor:
        return tensor.clone()

    for _ in range(2):  # the same function again is a conversion of its own
        model._apply(convert)
        assert model.head.weight is model.embed.weight
    old = model.head.weight
    model.embed.weight[0] = 1
    model._apply(convert)
    assert model.head.weight is not old
    assert (model.head.weight[0] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The dtype that a float layer would return there, from sums that autocast does not touch."""
    for config in CONFIGS:
        for layer, input in ((nn.Linear(9, 6), torch.randn(5, 9)), (nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 5))):
            kind: Any = Int8Linear if isinstance(layer, nn.Linear) else Int8Conv2d
            made = known(kind.from_float(layer, config), input)
            want = made(input)
            with torch.autocast("cpu", dtype=dtype):
                got = made(input)
                assert made(input.double()).dtype is torch.float64
            assert got.dtype is dtype
            assert torch.equal(got, want.to(dtype))


def test_float_weights_are_not_loaded_into_int8_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    state = model.state_dict()
    quantize_(model)
    with pytest.raises(RuntimeError, match=r"0\.weight must be int8, got float32: load float weights first, then call"):
        model.load_state_dict(state)


def test_a_scale_that_is_not_known_is_refused() -> None:
    layer = Int8Linear.from_float(nn.Linear(4, 3), Static())
    assert layer.input_scale is not None
    assert layer.input_scale.isnan()
    message = (
        r"int8_linear: input_scale must be positive and finite \(a layer with Static\(\) gets its own in `with cal"
    )
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 4))


@pytest.mark.native
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_has_no_number(wrong: float) -> None:
    """int8 has no infinity: it is in the scale, so that no weight of 0 comes of it."""
    values = torch.tensor([[1.0, wrong, 0.0], [0.5, -1.0, 0.25]])
    numbers, scale = quantize_channels(values)
    assert (numbers * scale.unsqueeze(1)).isnan().any(1).tolist() == [True, False]
    assert (quantize(values, torch.tensor(wrong)) * torch.tensor(wrong)).isnan().all(), "as those of an image on a GPU"
    layer = nn.Linear(3, 2)
    layer.weight.data.copy_(values)
    table = nn.Embedding.from_pretrained(values)
    assert Int8Linear.from_float(layer)(torch.ones(4, 3)).isnan().any(0).tolist() == [True, False]
    assert Int8Embedding.from_float(table)(torch.arange(2)).isnan().any(1).tolist() == [True, False]
    conv = nn.Conv2d(3, 2, 1)
    conv.weight.data.copy_(values[:, :, None, None])
    assert Int8Conv2d.from_float(conv)(torch.ones(4, 3, 2, 2)).isnan().any((0, 2, 3)).tolist() == [True, False]


@pytest.mark.native
@pytest.mark.parametrize("step", [1e-45, 1e-40, 1e-30])
def test_a_quotient_that_overflows_takes_the_last_step(step: float) -> None:
    layer = Int8Linear(torch.ones(1, 3, dtype=torch.int8), torch.ones(1), config=Static())
    layer.input_scale = torch.tensor(step)
    values = torch.tensor([[0.0, 3e38, 0.0], [-3e38, 0.0, 0.0], [torch.inf, 0.0, 0.0]])
    assert torch.equal(layer(values)[:2], torch.tensor([[127.0], [-127.0]]) * torch.tensor(step))
    assert layer(values)[2].isnan()


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_no_silent_loss_of_a_gradient(config: Any) -> None:
    input = torch.randn(2, 4, requires_grad=True)
    layer = known(Int8Linear.from_float(nn.Linear(4, 3), config), input.detach())
    with pytest.raises(RuntimeError, match="there is no gradient through int8 layers"):
        layer(input).sum().backward()
    with torch.inference_mode():
        assert torch.equal(layer(input), layer(input.detach()))


def test_a_convolution_of_int8_weights_alone_has_the_gradient_of_its_input() -> None:
    layer = Int8Conv2d.from_float(nn.Conv2d(2, 3, 3, padding=1), WeightOnly())
    x, other = (torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    weight = layer.weight * layer.scale[:, None, None, None]
    layer(x).square().sum().backward()
    nn.functional.conv2d(other, weight, layer.bias, padding=1).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(x.grad, other.grad)


def test_compile() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = known(Int8Conv2d.from_float(nn.Conv2d(3, 4, 2, padding="same")), torch.ones(1))
            self.linear = known(Int8Linear.from_float(nn.Linear(4, 5), Static()), torch.ones(1))
            self.weight_only = Int8Linear.from_float(nn.Linear(5, 5), WeightOnly())
            self.embed = Int8Embedding.from_float(nn.Embedding(7, 5))

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            out: Tensor = self.weight_only(self.linear(self.conv(x).mean((2, 3))) + self.embed(ids))
            return out

    model = Both()
    for n in (3, 4, 6):
        x, chosen = torch.randn(n, 3, 5, 5), torch.arange(n)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, chosen), model(x, chosen))


def test_export() -> None:
    model, input = tied(), ids()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (input,), dynamic_shapes=({0: batch},))
        more = ids(5)
        assert torch.equal(program.module()(more), model(more))
    names = {str(node.target) for node in program.graph.nodes if "fastkd" in str(node.target)}
    assert names == {"fastkd.int8_linear.default", "fastkd.int8_embedding.default"}


DDP = """
    import sys, warnings
    import torch, torch.distributed as dist
    from torch import nn
    warnings.filterwarnings("ignore")
    from fastkd.int8 import Static, quantize_
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)  # different weights, until the first rank's are sent
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).eval()
    quantize_(model, {"0": Static(), "1": None})
    model[0].input_scale.fill_(0.1 * (rank + 1))
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(torch.ones(2, 4)).sum().backward()
    for tensor in model.state_dict().values():
        every = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(every, tensor)
        assert torch.equal(*every)
    assert model[0].input_scale == torch.tensor(0.1)
    dist.destroy_process_group()
    print("equal")
"""


@pytest.mark.slow
def test_ddp_sends_the_buffers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(DDP)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), results[0][1] + results[1][1]
    assert [out.split() for out, _ in results] == [["equal"], ["equal"]]


def test_repr() -> None:
    made = Int8Conv2d.from_float(nn.Conv2d(4, 8, 3, stride=2))
    assert repr(made) == (
        "Int8Conv2d(8, 4, 3, 3, dynamic, bias=True, stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=1)"
    )
    assert repr(Int8Linear.from_float(nn.Linear(4, 8, bias=False), Static())) == "Int8Linear(8, 4, static, bias=False)"
