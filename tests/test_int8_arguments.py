"""Every refusal of the int8 layers, with its message: <op>: <argument> must <rule>, got <value>."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from int8_problems import flat, int8, scales, weights

IMPLEMENTATIONS = ("reference", "native")
X, W, SCALE, BIAS = flat(3, 8), weights(5, 8), scales(5), flat(5)
IMAGE, KERNEL = flat(2, 8, 9, 9), weights(6, 4, 3, 3)
IDS = torch.tensor([1, 2])
FLOATS = "be float16, bfloat16, float32 or float64"
META = torch.empty(5, device="meta")

LINEAR: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "weight_type": (TypeError, "weight must be a tensor, got list", (X, [1], SCALE), {}),
    "weight_dtype": (TypeError, "weight must be int8, got torch.float32", (X, W.float(), SCALE), {}),
    "weight_sparse": (
        TypeError,
        "weight must be a dense (strided) tensor, got torch.sparse_coo",
        (X, W.to_sparse(), SCALE),
        {},
    ),
    "weight_shape": (ValueError, "weight must have 2 dimensions, got shape (5, 8, 1)", (X, W[..., None], SCALE), {}),
    "input_type": (TypeError, "input must be a tensor, got str", ("x", W, SCALE), {}),
    "input_dtype": (TypeError, f"input must {FLOATS}, got torch.int64", (X.long(), W, SCALE), {}),
    "input_shape": (
        ValueError,
        "input must end in a dimension of 8, the weight's, got shape (3, 7)",
        (X[:, :7], W, SCALE),
        {},
    ),
    "input_0_dim": (
        ValueError,
        "input must end in a dimension of 8, the weight's, got shape ()",
        (X[0, 0], W, SCALE),
        {},
    ),
    "weight_device": (
        ValueError,
        "weight must be on the input's device, cpu, got meta",
        (X, W.to("meta"), SCALE),
        {},
    ),
    "scale_type": (TypeError, "scale must be a tensor, got float", (X, W, 0.1), {}),
    "scale_dtype": (TypeError, f"scale must {FLOATS}, got torch.int32", (X, W, SCALE.int()), {}),
    "scale_shape": (
        ValueError,
        "scale must have one number for each of 5 channels, got shape (4,)",
        (X, W, SCALE[:4]),
        {},
    ),
    "scale_matrix": (
        ValueError,
        "scale must have one number for each of 5 channels, got shape (5, 1)",
        (X, W, SCALE[:, None]),
        {},
    ),
    "scale_device": (ValueError, "scale must be on the input's device, cpu, got meta", (X, W, META), {}),
    "bias_shape": (
        ValueError,
        "bias must have one number for each of 5 channels, got shape ()",
        (X, W, SCALE, BIAS[0]),
        {},
    ),
    "bias_device": (ValueError, "bias must be on the input's device, cpu, got meta", (X, W, SCALE, META), {}),
    "residual_type": (TypeError, "residual must be a tensor, got int", (X, W, SCALE), {"residual": 1}),
    "residual_shape": (
        ValueError,
        "residual must have the shape of the output, (3, 5), got (3, 8)",
        (X, W, SCALE),
        {"residual": X},
    ),
    "residual_dtype": (
        TypeError,
        "residual must have the input's dtype, torch.float32, got torch.float16",
        (X, W, SCALE),
        {"residual": X[:, :5].half()},
    ),
    "residual_device": (
        ValueError,
        "residual must be on the input's device, cpu, got meta",
        (X, W, SCALE),
        {"residual": X[:, :5].to("meta")},
    ),
    "activation": (
        ValueError,
        "activation must be one of none, relu, gelu, gelu_tanh, silu, got 'tanh'",
        (X, W, SCALE),
        {"activation": "tanh"},
    ),
    "impl": (
        ValueError,
        "impl must be one of native, reference, got 'cuda'",
        (X, W, SCALE),
        {"impl": "cuda"},
    ),
}

UNKNOWN = "must be positive and finite (a layer with Static() gets its own in `with calibrate(model):`)"
INPUT_SCALE: dict[str, tuple[type[Exception], str, Any]] = {
    "type": (TypeError, "input_scale must be a tensor of one number, or None, got float", 0.1),
    "dtype": (TypeError, f"input_scale must {FLOATS}, got torch.int64", torch.tensor(1)),
    "shape": (ValueError, "input_scale must be one number, got shape (2,)", torch.ones(2)),
    "device": (ValueError, "input_scale must be on the input's device, cpu, got meta", torch.ones((), device="meta")),
    "zero": (ValueError, "input_scale must be positive and finite, got 0.0", torch.tensor(0.0)),
    "negative": (ValueError, "input_scale must be positive and finite, got -1.0", torch.tensor(-1.0)),
    "infinite": (ValueError, "input_scale must be positive and finite, got inf", torch.tensor(torch.inf)),
    "nan": (ValueError, f"input_scale {UNKNOWN}, got nan", torch.tensor(torch.nan)),
}

CONV2D: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "weight": (ValueError, "weight must have 4 dimensions, got shape (5, 8)", (IMAGE, W, SCALE), {}),
    "no_taps": (ValueError, "weight must have at least one tap, got shape (6, 4, 0, 3)", (IMAGE, KERNEL[:, :, :0]), {}),
    "input_shape": (
        ValueError,
        "input must have the shape (N, C, H, W) or (C, H, W), got shape (8, 9)",
        (IMAGE[0, :, 0], KERNEL),
        {},
    ),
    "channels": (ValueError, "input must have 4 channels, the weight's, got shape (2, 8, 9, 9)", (IMAGE, KERNEL), {}),
    "groups": (ValueError, "groups must divide the weight's 6 channels, got 4", (IMAGE, KERNEL), {"groups": 4}),
    "no_groups": (ValueError, "groups must divide the weight's 6 channels, got 0", (IMAGE, KERNEL), {"groups": 0}),
    "groups_type": (TypeError, "groups must be an integer, got bool", (IMAGE, KERNEL), {"groups": True}),
    "small": (
        ValueError,
        "input must be, with its padding, as large as the kernel (3, 3), got shape (2, 8, 2, 9)",
        (IMAGE[:, :, :2], KERNEL),
        {"groups": 2},
    ),
    "dilated": (
        ValueError,
        "input must be, with its padding, as large as the kernel (3, 3), got shape (2, 8, 9, 9)",
        (IMAGE, KERNEL),
        {"groups": 2, "dilation": (1, 5)},
    ),
    "stride": (ValueError, "stride must be 1 or more in both directions, got 0", (IMAGE, KERNEL), {"stride": 0}),
    "padding": (
        ValueError,
        "padding must be 0 or more in both directions, got (1, -1)",
        (IMAGE, KERNEL),
        {"padding": (1, -1)},
    ),
    "padding_type": (
        TypeError,
        "padding must be an integer or a pair of them, got 'same'",
        (IMAGE, KERNEL),
        {"padding": "same"},
    ),
    "dilation": (
        ValueError,
        "dilation must be 1 or more in both directions, got (1, 2, 3)",
        (IMAGE, KERNEL),
        {"dilation": (1, 2, 3)},
    ),
    "residual": (
        ValueError,
        "residual must have the shape of the output, (2, 6, 7, 7), got (2, 8, 9, 9)",
        (IMAGE, KERNEL),
        {"groups": 2, "residual": IMAGE},
    ),
}

EMBEDDING: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "input_type": (TypeError, "input must be a tensor of ids, got list", ([1], W, SCALE), {}),
    "input_dtype": (TypeError, "input must hold integer ids, got torch.float32", (IDS.float(), W, SCALE), {}),
    "input_bool": (TypeError, "input must hold integer ids, got torch.bool", (IDS.bool(), W, SCALE), {}),
    "dtype": (TypeError, f"dtype must {FLOATS}, got torch.int8", (IDS, W, SCALE), {"dtype": torch.int8}),
    "device": (ValueError, "weight must be on the input's device, cpu, got meta", (IDS, W.to("meta"), SCALE), {}),
    "scale": (
        ValueError,
        "scale must have one number for each of 5 channels, got shape (4,)",
        (IDS, W, SCALE[:4]),
        {},
    ),
}


def refused(op: str, call: Any, error: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'{op}: {message}')}"):
        call(*arguments, **options)


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case: str) -> None:
    error, message, arguments, options = LINEAR[case]
    refused("int8_linear", int8.linear, error, message, *arguments, **options)
    refused("int8_weight_only_linear", int8.weight_only_linear, error, message, *arguments, **options)


@pytest.mark.parametrize("case", INPUT_SCALE)
def test_input_scale(case: str, impl: str) -> None:
    error, message, value = INPUT_SCALE[case]
    refused("int8_linear", int8.linear, error, message, X, W, SCALE, input_scale=value, impl=impl)
    image = {"groups": 2, "input_scale": value, "impl": impl}
    refused("int8_conv2d", int8.conv2d, error, message, IMAGE, KERNEL, scales(6), **image)


@pytest.mark.parametrize("case", CONV2D)
def test_conv2d(case: str) -> None:
    error, message, (image, kernel, *scale), options = CONV2D[case]
    refused("int8_conv2d", int8.conv2d, error, message, image, kernel, *(scale or [scales(6)]), **options)


@pytest.mark.parametrize("case", EMBEDDING)
def test_embedding(case: str) -> None:
    error, message, arguments, options = EMBEDDING[case]
    refused("int8_embedding", int8.embedding, error, message, *arguments, **options)


@pytest.mark.native
def test_float64_is_refused_where_it_is_pinned() -> None:
    message = "impl='native' cannot run here: no kernel computes float64; what can: reference"
    refused("int8_linear", int8.linear, RuntimeError, message, X.double(), W, SCALE, impl="native")
    table = {"dtype": torch.float64, "impl": "native"}
    refused("int8_embedding", int8.embedding, RuntimeError, message, IDS, W, SCALE, **table)


def test_memory_that_was_freed_is_no_null_pointer() -> None:
    x = flat(3, 8)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=re.escape("fastkd: a tensor of shape (3, 8) must have memory, got none")):
        int8.linear(x, W, SCALE)
