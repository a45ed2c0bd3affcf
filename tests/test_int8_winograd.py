"""3 x 3 convolutions by Winograd's minimal filtering: the bits of the formula, as the sum of all taps gives them."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from int8_problems import (
    ACTIVATIONS,
    DTYPES,
    as_many_as_fill_the_caches,
    assert_same_bits,
    conv2d,
    flat,
    int8,
    scales,
    weights,
)
from torch import Tensor

pytestmark = pytest.mark.native
FORMATS = (torch.contiguous_format, torch.channels_last)
MOST = 9 * 128 * 229  # of weights' magnitudes whose sums with numbers up to 127 are below 2^25


def extension() -> Any:
    from fastkd.native import int8_conv2d

    return int8_conv2d._C


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that were made this way, which is taken wherever it is possible, whether it pays or not."""
    made: list[Any] = []
    compute = extension().int8_winograd

    def pays(shape: tuple[int, ...], images: tuple[int, ...], threads: int) -> bool:
        kernel_and_stride, dilation = images[4:8], images[10:]
        return kernel_and_stride == (3, 3, 1, 1) and dilation == (1, 1) and shape[3] == 1

    monkeypatch.setattr(extension(), "int8_winograd_pays", pays)
    monkeypatch.setattr(extension(), "int8_winograd", lambda *numbers: (made.append(numbers), compute(*numbers))[1])
    return made


@pytest.mark.parametrize("seed", range(120))
def test_any_shape_has_the_bits_of_the_formula(calls: list[Any], seed: int) -> None:
    dice = random.Random(seed)
    terms = dice.choice([1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 70])
    count = dice.choice([1, 3, 15, 16, 17, 32, 40, 64, 70, 130])
    dtype, activation, padding = dice.choice(DTYPES), dice.choice(["none", "relu"]), dice.randrange(4)
    shape = dice.choice([1, 2, 3]), terms, dice.randrange(3, 15), dice.randrange(3, 15)
    x = flat(*shape, seed=seed, dtype=dtype).to(memory_format=dice.choice(FORMATS))
    w, scale, bias = weights(count, terms, 3, 3, seed=seed), scales(count, seed), flat(count, seed=1)
    bias = bias if dice.random() < 0.7 else None
    step = 0.021 if dice.random() < 0.4 else None
    want = conv2d(x, w, scale, bias, step, padding=padding)
    residual = flat(*want.shape, seed=2, dtype=dtype) if dice.random() < 0.5 else None
    options = {"input_scale": None if step is None else torch.tensor(step), "activation": activation}
    torch.set_num_threads(dice.choice([1, 2, 3]))
    got = int8.conv2d(x, w, scale, bias, residual=residual, padding=padding, **options, impl="native")
    assert got.is_contiguous(memory_format=torch.channels_last) or got.is_contiguous()
    assert_same_bits(got, ACTIVATIONS[activation](conv2d(x, w, scale, bias, step, residual, padding=padding)))
    assert len(calls) == 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("side", [(30, 33), (7, 7), (57, 12)])
def test_networks_like_these(
    calls: list[Any], side: tuple[int, int], form: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles than a batch and than a run, more columns than a block, and every activation with a residual."""
    x = flat(3, 64, *side).to(memory_format=form)
    w, scale, bias, residual = weights(150, 64, 3, 3), scales(150) * 0.01, flat(150), flat(3, 150, *side, seed=1)

    def results() -> list[Tensor]:
        found = []
        for threads, activation in enumerate(ACTIVATIONS, 1):
            torch.set_num_threads(threads)
            options: dict[str, Any] = {"activation": activation, "residual": residual, "padding": 1}
            found.append(int8.conv2d(x, w, scale, bias, **options, impl="native"))
        return found

    got = results()
    assert len(calls) == len(ACTIVATIONS)
    assert_same_bits(got[0], conv2d(x, w, scale, bias, None, residual, padding=1))
    monkeypatch.setattr(extension(), "int8_winograd_pays", lambda *_: False)
    assert all(map(torch.equal, got, results()))
    assert len(calls) == len(ACTIVATIONS)


@pytest.mark.parametrize("form", FORMATS)
def test_images_in_several_rounds_of_memory(calls: list[Any], form: torch.memory_format) -> None:
    x, w, scale = flat(3, 40, 150, 160).to(memory_format=form), weights(20, 40, 3, 3), scales(20)
    assert_same_bits(int8.conv2d(x, w, scale, padding=1, impl="native"), conv2d(x, w, scale, None, padding=1))
    assert len(calls) == 1


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_outputs_that_are_larger_than_the_caches(calls: list[Any], activation: str) -> None:
    """They are written past these."""
    count = as_many_as_fill_the_caches(4 * 64 * 30**2) + 2
    x = flat(count, 3, 30, 30).to(memory_format=torch.channels_last)
    w, scale, bias = weights(64, 3, 3, 3), scales(64), flat(64)
    options: dict[str, Any] = {"padding": 1, "activation": activation, "impl": "native"}
    for image, part in zip(x, int8.conv2d(x, w, scale, bias, **options), strict=True):
        assert_same_bits(part, int8.conv2d(image, w, scale, bias, **options))
    assert len(calls) == 1 + count


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("terms", [229, 230])
def test_sums_as_large_as_can_be_told_apart(calls: list[Any], terms: int, sign: int) -> None:
    """Outputs are known modulo 2^26; where a sum could be larger than half of that, all taps are added."""
    w = torch.full((2, terms, 3, 3), -128, dtype=torch.int8)
    w[1] = weights(terms, 3, 3)
    x = torch.full((1, terms, 6, 6), 127.0 * sign)
    x[..., :2] *= -1
    got = int8.conv2d(x, w, torch.ones(2), input_scale=torch.tensor(1.0), padding=1, impl="native")
    assert_same_bits(got, conv2d(x, w, torch.ones(2), None, 1.0, padding=1))
    assert got.abs().max() == terms * 9 * 128 * 127
    assert len(calls) == (w[0].long().abs().sum() <= MOST)


def test_transforms_as_large_as_can_be(calls: list[Any]) -> None:
    """Numbers and weights whose signs follow each row of the transforms, and each row's opposite."""
    rows = torch.tensor([[1, 1, -1, 1, 1, 1], [1, -1, -1, 1, 1, 1], [1, 1, -1, -1, 1, 1], [1, -1, -1, 1, 1, -1]])
    rows = torch.cat([rows, rows.flip(1), torch.ones(1, 6, dtype=torch.long)])
    x = 127.0 * (rows[:, None, :, None] * rows[None, :, None, :]).flatten(0, 1).unsqueeze(0)  # an image of 81 channels
    x = torch.cat([x, -x])
    taps = torch.tensor([[1, 1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, -1]])
    kernels = (taps[:, None, :, None] * taps[None, :, None, :]).flatten(0, 1)
    w = (kernels.unsqueeze(1) * torch.ones(81, 1, 1)).mul(-128).clamp(max=127).to(torch.int8)
    got = int8.conv2d(x, w, torch.ones(16), input_scale=torch.tensor(1.0), impl="native")
    assert_same_bits(got, conv2d(x, w, torch.ones(16), None, 1.0))
    assert len(calls) == 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_is_nan_and_harms_no_other(
    calls: list[Any], wrong: float, step: float | None, form: torch.memory_format
) -> None:
    """Tiles at the edge of an image reach beyond it, and none into the next."""
    x, w, scale = flat(3, 17, 7, 9).to(memory_format=form), weights(7, 17, 3, 3), scales(7)
    given = None if step is None else torch.tensor(step)
    clean = int8.conv2d(x, w, scale, input_scale=given, impl="native")
    x[1] = wrong
    x[1].view(torch.int32)[:, ::2] |= 0x1234  # NaNs with other bits
    got = int8.conv2d(x, w, scale, input_scale=given, activation="relu", impl="native")
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]].relu())
    assert len(calls) == 2


def test_shapes_at_the_edge(calls: list[Any]) -> None:
    w, scale, bias = weights(7, 5, 3, 3), scales(7), flat(7)
    assert int8.conv2d(torch.zeros(0, 5, 9, 9), w, scale, impl="native").shape == (0, 7, 7, 7)
    assert int8.conv2d(flat(1, 5, 9, 9), weights(0, 5, 3, 3), scales(0), impl="native").shape == (1, 0, 7, 7)
    got = int8.conv2d(torch.zeros(2, 5, 9, 9), w, scale, bias, padding=1, impl="native")
    assert torch.equal(got, bias.view(1, 7, 1, 1).expand(2, 7, 9, 9))
    assert len(calls) == 3


def pays(terms: int, count: int, batch: int, side: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1,
         groups: int = 1) -> bool:  # fmt: skip
    shape = (count, terms // groups, kernel**2, groups, kernel if dilation == 1 else 1)
    images = (batch, side, side, False, kernel, kernel, stride, stride, 1, 1, dilation, dilation)
    return bool(extension().int8_winograd_pays(shape, images, 1))


def test_where_it_pays() -> None:
    """In layers of a ResNet; not for other kernels, nor where there are few channels or hardly a tile."""
    for channels, side, batch in ((64, 56, 1), (128, 28, 8), (256, 14, 8), (512, 7, 8)):
        assert pays(channels, channels, batch, side)
        assert not pays(channels, channels, batch, side, stride=2)
        assert not pays(channels, channels, batch, side, dilation=2)
        assert not pays(channels, channels, batch, side, groups=2)
        assert not pays(channels, channels, batch, side, groups=channels)
        assert not pays(channels, channels, batch, side, kernel=5)
        assert not pays(channels, channels, 1, 3)
        assert not pays(3, channels, batch, side)
        assert not pays(channels, 4, batch, side)
    assert not pays(512, 512, 0, 7)
    assert not pays(512, 0, 1, 7)
    assert not pays(512, 512, 1, 7), "eight times the weights are read for four tiles"


def layer_and_image() -> tuple[Tensor, Tensor, Tensor]:
    return weights(64, 64, 3, 3), scales(64), flat(1, 64, 28, 28)


def test_weights_are_transformed_once_and_follow_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.native import int8_packing

    made: list[Tensor | None] = []
    transform = int8_packing._transform
    monkeypatch.setattr(int8_packing, "_transform", lambda *of: (made.append(transform(*of)), made[-1])[1])
    w, scale, x = layer_and_image()
    gc.collect()
    before = len(int8_packing._kept)
    for _ in range(3):
        for image in (x, x[..., :5, :5].contiguous()):  # this way and the other, by turns
            want = int8.conv2d(image, w, scale, impl="reference")
            assert torch.equal(int8.conv2d(image, w, scale, impl="native"), want)
    assert len(made) == 1
    assert made[0] is not None
    assert made[0].nbytes >= 8 * w.nbytes
    w[3] = 5
    assert torch.equal(int8.conv2d(x, w, scale, impl="native"), int8.conv2d(x, w, scale, impl="reference"))
    assert len(made) == 2
    del w
    gc.collect()
    assert len(int8_packing._kept) == before


def test_weights_that_are_too_large_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.native import int8_packing

    made: list[Tensor | None] = []
    transform = int8_packing._transform
    monkeypatch.setattr(int8_packing, "_transform", lambda *of: (made.append(transform(*of)), made[-1])[1])
    w, x = torch.full((64, 256, 3, 3), 127, dtype=torch.int8), flat(1, 256, 28, 28)
    assert pays(256, 64, 1, 28)
    for scale in (scales(64), scales(64, 1), scales(64, 2)):
        assert_same_bits(int8.conv2d(x, w, scale, impl="native"), conv2d(x, w, scale, None))
    assert made == [None]


def test_weights_of_inference_mode_are_not_transformed(calls: list[Any]) -> None:
    """They would be each time."""
    with torch.inference_mode():
        w, scale, x = layer_and_image()
        for _ in range(2):
            assert torch.equal(int8.conv2d(x, w, scale, impl="native"), int8.conv2d(x, w, scale, impl="reference"))
            w.neg_()
    assert not calls
