"""int8 convolutions: every implementation gives the bits of the formula, in both memory formats."""

from __future__ import annotations

import itertools
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

IMPLEMENTATIONS = ("reference", "native")
FORMATS = (torch.contiguous_format, torch.channels_last)


def window_of(dice: random.Random) -> dict[str, Any]:
    pairs = {"stride": (1, 2, 3), "padding": (0, 1, 2), "dilation": (1, 2)}
    return {name: (dice.choice(choices), dice.choice(choices)) for name, choices in pairs.items()}


def images(dice: random.Random, channels: int, dtype: torch.dtype) -> Tensor:
    batch, height, width = dice.choice([1, 2, 3]), dice.choice([9, 12, 17]), dice.choice([9, 14, 20, 40])
    return flat(batch, channels, height, width, seed=channels, dtype=dtype).to(memory_format=dice.choice(FORMATS))


@pytest.mark.parametrize("seed", range(80))
def test_any_shape_has_the_bits_of_the_formula(impl: str, seed: int) -> None:
    dice = random.Random(seed)
    groups, taken, given = (
        dice.choice([1, 1, 2, 3]),
        dice.choice([1, 2, 3, 4, 5, 8, 17]),
        dice.choice([1, 2, 8, 20, 33]),
    )
    if dice.random() < 0.25:  # a channel a group
        groups, taken, given = dice.choice([1, 3, 16, 21, 100]), 1, dice.choice([1, 1, 2])
    kernel = dice.choice([(1, 1), (3, 3), (1, 3), (2, 5)])
    dtype, activation, window = (
        dice.choice(DTYPES),
        dice.choice(["none", "relu"]),
        {**window_of(dice), "groups": groups},
    )
    x = images(dice, groups * taken, dtype)
    count = groups * given
    w, scale, bias = weights(count, taken, *kernel, seed=seed), scales(count, seed), flat(count, seed=1)
    bias = bias if dice.random() < 0.7 else None
    step = 0.021 if dice.random() < 0.4 else None
    want = conv2d(x, w, scale, bias, step, **window)
    residual = flat(*want.shape, seed=2, dtype=dtype) if dice.random() < 0.5 else None
    options = {"input_scale": None if step is None else torch.tensor(step), "activation": activation}
    got = int8.conv2d(x, w, scale, bias, residual=residual, **options, **window, impl=impl)
    assert got.dtype is dtype
    assert_same_bits(got, ACTIVATIONS[activation](conv2d(x, w, scale, bias, step, residual, **window)))


@pytest.mark.parametrize("form", FORMATS)
def test_the_output_has_the_memory_format_of_the_input(impl: str, form: torch.memory_format) -> None:
    x, w, scale = flat(2, 5, 9, 9).to(memory_format=form), weights(7, 5, 3, 3), scales(7)
    assert int8.conv2d(x, w, scale, impl=impl).is_contiguous(memory_format=form)
    crop = x[:, :, 1:8, 2:]  # neither
    assert_same_bits(int8.conv2d(crop, w, scale, impl=impl), conv2d(crop, w, scale, None))


def test_residuals_of_another_memory_format(impl: str) -> None:
    x, w, scale = flat(2, 5, 9, 9), weights(7, 5, 3, 3), scales(7)
    residual = flat(2, 7, 7, 7, seed=1).to(memory_format=torch.channels_last)
    want = conv2d(x, w, scale, None, None, residual)
    assert_same_bits(int8.conv2d(x, w, scale, residual=residual, impl=impl), want)
    last = x.to(memory_format=torch.channels_last)
    assert_same_bits(int8.conv2d(last, w, scale, residual=residual.contiguous(), impl=impl), want)


@pytest.mark.parametrize("groups", [1, 64])
@pytest.mark.parametrize("form", FORMATS)
def test_networks_like_these(impl: str, form: torch.memory_format, groups: int) -> None:
    """Images larger than a strip of pixels, more columns than a block, and every activation with a residual."""
    x = flat(2, 64, 20, 19).to(memory_format=form)
    w, scale, bias = weights(128, 64 // groups, 3, 3), scales(128) * 0.01, flat(128)
    residual = flat(2, 128, 10, 10, seed=1).to(memory_format=form)
    window: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups}
    before = conv2d(x, w, scale, bias, None, residual, **window)
    for name, activation in ACTIVATIONS.items():
        got = int8.conv2d(x, w, scale, bias, activation=name, residual=residual, **window, impl=impl)
        torch.testing.assert_close(got, activation(before), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_is_nan_and_harms_no_other(
    impl: str, wrong: float, step: float | None, form: torch.memory_format
) -> None:
    x, w, scale = flat(3, 5, 9, 9).to(memory_format=form), weights(7, 5, 3, 3), scales(7)
    given = None if step is None else torch.tensor(step)
    clean = int8.conv2d(x, w, scale, input_scale=given, impl=impl)
    x[1, 4, 8, 8] = wrong
    got = int8.conv2d(x, w, scale, input_scale=given, activation="relu", impl=impl)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]].relu())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [None, 0.5])
def test_lines_that_no_output_reads_belong_to_the_image(
    impl: str, form: torch.memory_format, step: float | None
) -> None:
    """Their largest number is the image's, and what is not finite there makes it NaN."""
    x, w, scale = flat(3, 5, 9, 9).to(memory_format=form), weights(7, 5, 1, 2), scales(7)
    x[0, :, 4], x[1, 2, 4, 4] = 100.0, torch.nan  # with steps of 3 lines 0, 3 and 6 are read
    options = {"input_scale": None if step is None else torch.tensor(step), "stride": (3, 2), "impl": impl}
    got = int8.conv2d(x, w, scale, **options)
    assert_same_bits(got, conv2d(x, w, scale, None, step, stride=(3, 2)))
    assert got.isnan().flatten(1).all(1).tolist() == got.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_pixels_that_no_output_reads_belong_to_the_image(
    impl: str, padding: int, form: torch.memory_format, step: float | None
) -> None:
    """With one tap and strides most of them are not even rounded. Each is tried, in an image of its own."""
    sides = 5, 7
    x, w, scale, bias = flat(35, 5, *sides).to(memory_format=form), weights(7, 5, 1, 1), scales(7), flat(7)
    options = {"input_scale": None if step is None else torch.tensor(step), "impl": impl}
    window: dict[str, Any] = {"stride": (2, 3), "padding": padding}
    for i, (large, nan) in enumerate(zip(x.clone(), x, strict=True)):
        large[2, i // 7, i % 7], nan[2, i // 7, i % 7] = 100.0, torch.nan
        one = large[None].contiguous(memory_format=form)
        assert_same_bits(
            int8.conv2d(one, w, scale, bias, **options, **window), conv2d(one, w, scale, bias, step, **window)
        )
    assert int8.conv2d(x, w, scale, bias, **options, **window).isnan().all()


def test_an_image_of_zeros_gives_the_bias(impl: str) -> None:
    bias = flat(7)
    got = int8.conv2d(torch.zeros(2, 5, 9, 9), weights(7, 5, 3, 3), scales(7), bias, padding=1, impl=impl)
    assert torch.equal(got, bias.view(1, 7, 1, 1).expand(2, 7, 9, 9))


def test_shapes_at_the_edge(impl: str) -> None:
    w, scale, bias = weights(7, 5, 3, 3), scales(7), flat(7)
    assert int8.conv2d(torch.zeros(0, 5, 9, 9), w, scale, impl=impl).shape == (0, 7, 7, 7)
    one = flat(5, 9, 9)
    assert_same_bits(int8.conv2d(one, w, scale, bias, impl=impl), conv2d(one[None], w, scale, bias)[0])
    residual = flat(7, 7, 7)
    got = int8.conv2d(one, w, scale, bias, residual=residual, impl=impl)
    assert_same_bits(got, conv2d(one[None], w, scale, bias, None, residual[None])[0])
    for form in FORMATS:  # as squeeze-and-excitation has it
        pixel = flat(3, 5, 1, 1).to(memory_format=form)
        assert_same_bits(int8.conv2d(pixel, w[:, :, :1, :1], scale, bias, impl=impl),
                         conv2d(pixel, w[:, :, :1, :1], scale, bias))  # fmt: skip
        got = int8.conv2d(pixel, w, scale, bias, padding=2, impl=impl)
        assert_same_bits(got, conv2d(pixel, w, scale, bias, padding=2))
    assert int8.conv2d(flat(1, 5, 9, 9), weights(0, 5, 3, 3), scales(0), impl=impl).shape == (1, 0, 7, 7)


@pytest.mark.parametrize(("channels", "kernel"), [(4000, (6, 6)), (140000, (1, 1))])
def test_sums_are_exact_however_long(impl: str, channels: int, kernel: tuple[int, int]) -> None:
    """Taps and channels that 32 bits cannot hold the sum of."""
    x = torch.full((1, channels, *kernel), 127.0)
    w = torch.cat([torch.full((1, channels, *kernel), -128), weights(1, channels, *kernel)]).to(torch.int8)
    got = int8.conv2d(x, w, torch.ones(2), input_scale=torch.tensor(1.0), impl=impl)
    want = w.double().sum((1, 2, 3)) * 127
    assert_same_bits(got.flatten(), want.float())


@pytest.mark.native
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kernel", [(7, 7), (3, 2), (2, 4)])
@pytest.mark.parametrize("channels", range(1, 10))
def test_few_channels_whose_taps_share_words(
    impl: str, channels: int, kernel: tuple[int, int], form: torch.memory_format
) -> None:
    """In lines that end with a pixel, with padding or without, and in taps with pixels between them, which do not."""
    x, count = flat(2, channels, 21, 19).to(memory_format=form), 20
    w, scale, bias = weights(count, channels, *kernel), scales(count), flat(count)
    for padding, dilation, stride in itertools.product(((0, 0), (2, 1)), (1, (1, 2)), (1, (2, 3))):
        window = {"padding": padding, "dilation": dilation, "stride": stride}
        assert_same_bits(int8.conv2d(x, w, scale, bias, **window, impl=impl), conv2d(x, w, scale, bias, **window))


@pytest.mark.native
@pytest.mark.parametrize("side", [32, 31])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("form", FORMATS)
def test_outputs_that_are_larger_than_the_caches(form: torch.memory_format, activation: str, side: int) -> None:
    """They are written past these, where their lines are whole: the bits are those of an image at a time."""
    count = as_many_as_fill_the_caches(4 * 64 * side**2) + 2
    x, w, scale, bias = flat(count, 3, side, side).to(memory_format=form), weights(64, 3, 1, 1), scales(64), flat(64)
    for image, part in zip(x, int8.conv2d(x, w, scale, bias, activation=activation, impl="native"), strict=True):
        assert_same_bits(part, int8.conv2d(image, w, scale, bias, activation=activation, impl="native"))


@pytest.mark.native
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_groups_that_end_within_a_line_of_the_cache(activation: str, groups: int) -> None:
    """What is written past the caches must be whole lines, at the beginning of every group."""
    columns = 24 if groups == 2 else 16
    count = as_many_as_fill_the_caches(4 * groups * columns * 256) + 2
    x = flat(count, 3 * groups, 16, 16).to(memory_format=torch.channels_last)
    w, scale, bias = weights(groups * columns, 3, 1, 1), scales(groups * columns), flat(groups * columns)
    options = {"groups": groups, "activation": activation, "impl": "native"}
    for image, part in zip(x, int8.conv2d(x, w, scale, bias, **options), strict=True):
        assert_same_bits(part, int8.conv2d(image, w, scale, bias, **options))


@pytest.mark.parametrize("form", FORMATS)
def test_threads_change_no_bit(form: torch.memory_format) -> None:
    """Large enough for several chunks, and for images in several rounds of memory."""
    x, w, scale = flat(3, 64, 120, 130).to(memory_format=form), weights(40, 64, 3, 3), scales(40)
    want = int8.conv2d(x, w, scale, padding=1, impl="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(int8.conv2d(x, w, scale, padding=1, impl="native"), want)
    some = int8.conv2d(x[2:], w, scale, padding=1, impl="reference")
    assert torch.equal(want[2:], some)
