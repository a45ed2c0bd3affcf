"""int8 convolutions of each channel by itself have ways of their own (csrc/cpu): each with the bits of the formula."""

from __future__ import annotations

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

IMPLEMENTATIONS = ("reference", "native")
FORMATS = (torch.contiguous_format, torch.channels_last)
# (channels, height, width), kernel, stride, padding, dilation.
PROBLEMS = {
    "one tap": ((70, 5, 9), (1, 1), (1, 1), (0, 0), (1, 1)),
    "one tap of any dilation": ((3, 5, 9), (1, 1), (1, 1), (0, 0), (10**9, 10**9)),
    "three": ((64, 14, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
    "channels and pixels of one": ((65, 9, 1), (3, 1), (1, 1), (1, 0), (1, 1)),
    "three and a half vectors": ((33, 8, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "a word's taps": ((5, 6, 20), (2, 4), (1, 1), (1, 2), (1, 1)),
    "more taps than a word": ((130, 9, 9), (5, 5), (1, 1), (2, 2), (1, 1)),
    "seven": ((20, 17, 15), (7, 7), (1, 1), (3, 3), (1, 1)),
    "two words and no more": ((6, 5, 30), (1, 8), (1, 1), (0, 4), (1, 1)),
    "stride 2": ((40, 28, 28), (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride 2, five": ((40, 15, 28), (5, 5), (2, 2), (2, 2), (1, 1)),
    "stride 3, whose words are not among the first": ((7, 20, 31), (3, 9), (3, 3), (1, 4), (1, 1)),
    "stride 4": ((7, 20, 61), (4, 7), (4, 4), (0, 0), (1, 1)),
    "stride 5": ((7, 20, 61), (3, 5), (5, 5), (1, 2), (1, 1)),
    "stride down alone": ((7, 20, 31), (3, 3), (3, 1), (1, 1), (1, 1)),
    "stride across alone": ((7, 20, 31), (3, 3), (1, 2), (1, 1), (1, 1)),
    "dilation 2": ((64, 20, 20), (3, 3), (1, 1), (2, 2), (2, 2)),
    "dilation 6": ((66, 20, 20), (3, 3), (1, 1), (6, 6), (6, 6)),
    "dilation and stride": ((9, 20, 40), (3, 5), (2, 2), (2, 4), (2, 2)),
    "dilation and stride far apart": ((9, 20, 60), (3, 5), (3, 3), (4, 8), (4, 4)),
    "lines down apart": ((9, 20, 20), (3, 2), (2, 1), (3, 0), (3, 1)),
    "taps farther than the image": ((5, 4, 5), (3, 21), (1, 1), (1, 20), (1, 1)),
    "taps farther than the image, stride 2": ((5, 4, 5), (3, 41), (2, 2), (1, 40), (1, 1)),
    "a long line of padding": ((3, 3, 3), (1, 41), (1, 1), (0, 70), (1, 1)),
    "nothing but padding": ((3, 3, 4), (1, 1), (10, 10), (2, 2), (1, 1)),
    "lines of nothing but padding": ((2, 3, 100), (3, 3), (1, 1), (90, 1), (1, 1)),
    "one pixel": ((100, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one output, of any stride": ((30, 7, 7), (7, 7), (10**9, 10**9), (0, 0), (1, 1)),
    "a plane in pieces": ((2, 80, 90), (3, 3), (1, 1), (1, 1), (1, 1)),
    "a plane in pieces, stride 2": ((2, 161, 150), (3, 3), (2, 2), (1, 1), (1, 1)),
    "pieces with lines between that no tap reads": ((2, 700, 20), (1, 1), (7, 1), (40, 200), (1, 1)),
    "lines longer than a piece": ((2, 3, 4500), (3, 3), (1, 1), (1, 1), (1, 1)),
    "planes that an item has no room for": ((300, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_has_the_bits_of_the_formula(impl: str, name: str, form: torch.memory_format) -> None:
    (channels, height, width), kernel, stride, padding, dilation = PROBLEMS[name]
    window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}
    number = list(PROBLEMS).index(name)
    batch, dtype, step = 1 + number % 3, DTYPES[number // 2 % 3], (None, 0.021)[number % 2]
    x = flat(batch, channels, height, width, seed=number, dtype=dtype).to(memory_format=form)
    w, scale, bias = weights(channels, 1, *kernel, seed=number), scales(channels), flat(channels)
    options: dict[str, Any] = {"input_scale": None if step is None else torch.tensor(step), **window, "impl": impl}
    got = int8.conv2d(x, w, scale, bias, **options)
    assert got.dtype is dtype
    assert_same_bits(got, conv2d(x, w, scale, bias, step, **window))
    residual = flat(*got.shape, seed=1, dtype=dtype).to(memory_format=form)
    got = int8.conv2d(x, w, scale, None, residual=residual, activation="relu", **options)
    assert_same_bits(got, conv2d(x, w, scale, None, step, residual, **window).relu())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("side", [7, 70])
def test_the_largest_numbers_and_weights(impl: str, side: int, form: torch.memory_format) -> None:
    x = torch.full((2, 70, side, side), 127.0).to(memory_format=form)
    x[1] = -127.0
    w, scale, step = torch.full((70, 1, 9, 9), -128, dtype=torch.int8), torch.ones(70), torch.tensor(1.0)
    window: dict[str, Any] = {"padding": 4, "groups": 70}
    assert_same_bits(
        int8.conv2d(x, w, scale, input_scale=step, **window, impl=impl), conv2d(x, w, scale, None, 1.0, **window)
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("where", [(0, 0, 0), (4, 5, 20), (4, 699, 19)])
def test_an_image_that_is_not_finite_is_nan_wherever_it_is(
    impl: str, where: tuple[int, int, int], step: float | None, form: torch.memory_format
) -> None:
    """Between the lines that taps read too, and in a plane of several pieces."""
    x, w, scale = flat(3, 5, 700, 21).to(memory_format=form), weights(5, 1, 1, 1), scales(5)
    options: dict[str, Any] = {"stride": (7, 1), "padding": (0, 20), "groups": 5, "impl": impl}
    given = None if step is None else torch.tensor(step)
    clean = int8.conv2d(x, w, scale, input_scale=given, **options)
    for wrong in (torch.nan, -torch.inf):
        x[1][where] = wrong
        got = int8.conv2d(x, w, scale, input_scale=given, activation="relu", **options)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], clean[[0, 2]].relu())


@pytest.mark.parametrize("form", FORMATS)
def test_images_of_zeros_and_of_the_smallest_numbers(impl: str, form: torch.memory_format) -> None:
    """A step of few digits: 190 of the smallest float are 190 steps of their own."""
    x, w, scale, bias = torch.zeros(3, 6, 9, 9), weights(6, 1, 3, 3), torch.ones(6), flat(6)
    x[1, 2, 3, 4], x[1, 5, 8, 8], x[2] = 190 * 2.0**-149, -150 * 2.0**-149, flat(6, 9, 9) * 1e-38
    x = x.to(memory_format=form)
    window: dict[str, Any] = {"padding": 1, "groups": 6}
    for b in (None, bias):
        assert_same_bits(int8.conv2d(x, w, scale, b, **window, impl=impl), conv2d(x, w, scale, b, **window))


@pytest.mark.parametrize("form", FORMATS)
def test_more_taps_than_a_sum_holds(impl: str, form: torch.memory_format) -> None:
    x = torch.full((1, 3, 200, 201), 127.0).to(memory_format=form)
    w = torch.full((3, 1, 200, 200), -128, dtype=torch.int8)
    w[1] = weights(1, 200, 200)
    scale, window = torch.ones(3), {"groups": 3}
    got = int8.conv2d(x, w, scale, input_scale=torch.tensor(1.0), **window, impl=impl)
    assert_same_bits(got, conv2d(x, w, scale, None, 1.0, **window))


@pytest.mark.parametrize("form", FORMATS)
def test_every_activation(impl: str, form: torch.memory_format) -> None:
    x, w, scale = flat(2, 70, 10, 11).to(memory_format=form), weights(70, 1, 3, 3), scales(70) * 0.01
    before = conv2d(x, w, scale, flat(70), padding=1, groups=70)
    for name, activation in ACTIVATIONS.items():
        got = int8.conv2d(x, w, scale, flat(70), activation=name, padding=1, groups=70, impl=impl)
        torch.testing.assert_close(got, activation(before), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_no_images(impl: str, form: torch.memory_format) -> None:
    x = torch.zeros(0, 4, 9, 9).to(memory_format=form)
    assert int8.conv2d(x, weights(4, 1, 3, 3), scales(4), groups=4, impl=impl).shape == (0, 4, 7, 7)


@pytest.mark.native
@pytest.mark.parametrize("step", [None, 0.02])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(9, 64, 60, 60), (2, 300, 14, 14), (2, 3, 300, 200)])
def test_threads_change_no_bit(shape: tuple[int, ...], form: torch.memory_format, step: float | None) -> None:
    """Images in several rounds of memory, planes together and planes in pieces."""
    channels = shape[1]
    x, w, scale = flat(*shape).to(memory_format=form), weights(channels, 1, 3, 3), scales(channels)
    options: dict[str, Any] = {
        "input_scale": None if step is None else torch.tensor(step),
        "groups": channels,
        "padding": 1,
    }
    torch.set_num_threads(1)
    want = int8.conv2d(x, w, scale, **options, impl="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(int8.conv2d(x, w, scale, **options, impl="native"), want)
    assert torch.equal(want[-1:], int8.conv2d(x[-1:], w, scale, **options, impl="reference"))


@pytest.mark.native
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("channels", [80, 72])
def test_outputs_that_are_larger_than_the_caches(channels: int, activation: str) -> None:
    """They are written past these, where their lines are whole: the bits are those of an image at a time."""
    count = as_many_as_fill_the_caches(4 * channels * 31**2) + 2
    x = flat(count, channels, 31, 31).to(memory_format=torch.channels_last)
    w, scale, bias = weights(channels, 1, 3, 3), scales(channels), flat(channels)
    options: dict[str, Any] = {"padding": 1, "groups": channels, "activation": activation, "impl": "native"}
    for image, part in zip(x, int8.conv2d(x, w, scale, bias, **options), strict=True):
        assert_same_bits(part, int8.conv2d(image, w, scale, bias, **options))
