"""What a head, and a loss over heads, refuses, and with which words."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastkd
from fastkd import Head
from fastkd.losses._sources import _operand_dtype

N, H, V = 3, 4, 7
INPUT, WEIGHT, BIAS = torch.zeros(N, H), torch.zeros(V, H), torch.zeros(V)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "Head: input must be a tensor, got list"),
        ({"weight": None}, TypeError, "Head: weight must be a tensor, got NoneType"),
        ({"bias": 0.0}, TypeError, "Head: bias must be a tensor, got float"),
        (
            {"input": INPUT.long()},
            TypeError,
            "Head: input must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"weight": WEIGHT.to(torch.complex64)},
            TypeError,
            "Head: weight must be float16, bfloat16, float32 or float64",
        ),
        ({"bias": BIAS.bool()}, TypeError, "Head: bias must be float16, bfloat16, float32 or float64, got torch.bool"),
        (
            {"weight": WEIGHT.to_sparse()},
            TypeError,
            "Head: weight must be a dense (strided) tensor, got torch.sparse_coo",
        ),
        (
            {"input": torch.zeros(())},
            ValueError,
            "Head: input must have a last dimension, the hidden size, got a 0-dim",
        ),
        ({"weight": torch.zeros(H)}, ValueError, "Head: weight must have shape (vocabulary, hidden size), got (4,)"),
        (
            {"weight": torch.zeros(1, V, H)},
            ValueError,
            "Head: weight must have shape (vocabulary, hidden size), got (1, 7",
        ),
        ({"weight": torch.zeros(0, H)}, ValueError, "an FSDP or ZeRO-3 shard has to be gathered first"),
        ({"weight": torch.zeros(0)}, ValueError, "an FSDP or ZeRO-3 shard has to be gathered first"),
        (
            {"input": torch.zeros(N, H + 1)},
            ValueError,
            "Head: input must have the weight's hidden size, 4, last, got (3, 5)",
        ),
        ({"weight": WEIGHT.t()}, ValueError, "Head: input must have the weight's hidden size, 7, last, got (3, 4)"),
        ({"bias": torch.zeros(H)}, ValueError, "Head: bias must have shape (7,), got (4,)"),
        ({"bias": torch.zeros(1, V)}, ValueError, "Head: bias must have shape (7,), got (1, 7)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "Head: weight must be on the input's device, cpu, got meta"),
        ({"bias": BIAS.to("meta")}, ValueError, "Head: bias must be on the input's device, cpu, got meta"),
        ({"scale": 0.0}, ValueError, "Head: scale must not be 0, got 0.0"),
        ({"scale": float("nan")}, ValueError, "Head: scale must be finite, got nan"),
        ({"scale": float("inf")}, ValueError, "Head: scale must be finite, got inf"),
        ({"scale": "1"}, TypeError, "Head: scale must be a number, got str"),
        ({"scale": torch.ones(())}, TypeError, "Head: scale must be a number, got Tensor"),
        ({"softcap": 0.0}, ValueError, "Head: softcap must be positive and finite in float32, got 0.0"),
        ({"softcap": -30.0}, ValueError, "Head: softcap must be positive and finite in float32, got -30.0"),
        ({"softcap": float("inf")}, ValueError, "Head: softcap must be positive and finite in float32, got inf"),
        ({"softcap": "30"}, TypeError, "Head: softcap must be a number"),
        ({"grad_precision": "bfloat16"}, ValueError, "Head: grad_precision must be one of float32, got 'bfloat16'"),
        ({"workspace": 0}, ValueError, "Head: workspace must be positive, got 0"),
        ({"workspace": 1e6}, TypeError, "Head: workspace must be an integer, got float"),
        ({"workspace": True}, TypeError, "Head: workspace must be an integer, got bool"),
    ],
)
def test_head_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": INPUT, "weight": WEIGHT, "bias": BIAS} | arguments
    with pytest.raises(error, match=re.escape(message)):
        Head(**given)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_set_workspace_refuses(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="set_workspace: bytes must be"):
        fastkd.set_workspace(value)


def head(vocabulary: int = V, rows: tuple[int, ...] = (N,), **options: Any) -> Head:
    return Head(torch.zeros(*rows, H), torch.zeros(vocabulary, H), **options)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        (head(), "logits", {}, TypeError, "kd_loss: teacher must be "),
        (head(), [], {}, ValueError, "kd_loss: teacher must hold at least one tensor"),
        (
            head(),
            head(rows=(N + 1,)),
            {},
            ValueError,
            "kd_loss: teacher must have the student's shape, (3, 7), got (4, 7)",
        ),
        (
            head(),
            head(rows=(1, N)),
            {},
            ValueError,
            "kd_loss: teacher must have the student's shape, (3, 7), got (1, 3, 7)",
        ),
        (head(), head(9), {}, ValueError, "kd_loss: teacher must have the student's vocabulary"),
        (head(), head(9), {"shared_vocab": 8}, ValueError, "kd_loss: shared_vocab must be from 1 to 7"),
        (head(), head(), {"dim": 0}, ValueError, "kd_loss: dim must be the last one with a Head, got 0"),
        (head(), head(), {"dim": 2}, ValueError, "kd_loss: dim must be an integer from -2 to 1, got 2"),
        (
            torch.zeros(2, V),
            head(rows=(2,)),
            {"dim": 0},
            ValueError,
            "kd_loss: dim must be the last one with a Head, got 0",
        ),
        (head(), torch.zeros(N, V, device="meta"), {}, ValueError, "kd_loss: teacher must be on the student's device"),
        (
            head(),
            head(),
            {"target": torch.zeros(N, 1).long()},
            ValueError,
            "kd_loss: target must have the shape of the rows",
        ),
        (head(), head(), {"target": torch.full((N,), V)}, ValueError, "kd_loss: target must hold ids from 0 to 6"),
        (head(), head(), {"target": torch.full((N,), -1)}, ValueError, "kd_loss: target must hold ids from 0 to 6"),
        (
            head(),
            head(),
            {"temperature": torch.zeros(N)},
            ValueError,
            "kd_loss: temperature must be positive and finite",
        ),
        (
            head(),
            head(),
            {"row_weight": torch.ones(2)},
            ValueError,
            "kd_loss: row_weight must have the shape of the rows",
        ),
        (
            head(),
            head(),
            {"normalizer": torch.tensor(-1.0)},
            ValueError,
            "kd_loss: normalizer must be finite and not negative",
        ),
        (
            head(),
            head(),
            {"impl": "cuda"},
            ValueError,
            "kd_loss: impl must be one of triton, native, reference, got 'cuda'",
        ),
        (torch.zeros(N, V).numpy(), head(), {}, TypeError, "kd_loss: student must be a tensor of logits or a Head"),
    ],
)
def test_losses_refuse(student: Any, teacher: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastkd.kd_loss(student, teacher, **options)


def test_float64_is_refused_where_it_is_not_computed(impl: str) -> None:
    if impl == "reference":
        pytest.skip("computes it")
    wide = Head(INPUT.double(), WEIGHT)
    assert wide.dtype is torch.float64
    with pytest.raises(RuntimeError, match="no kernel computes float64"):
        fastkd.kd_loss(wide, head(), impl=impl)
    with pytest.raises(RuntimeError, match="no kernel computes float64"):
        fastkd.kd_loss(head(), wide, impl=impl)
    assert fastkd.kd_loss(head(), wide).dtype is torch.float64


def test_what_a_head_says_of_itself() -> None:
    one = Head(torch.zeros(2, 3, H), WEIGHT.half(), BIAS, scale=2)
    assert (one.shape, one.dtype, one.device) == (torch.Size((2, 3, V)), torch.float32, torch.device("cpu"))
    assert [x.shape for x in one.tensors()] == [(2, 3, H), (V, H), (V,)]
    assert one.logits().shape == one.shape
    with pytest.raises(AttributeError):
        one.scale = 3.0  # type: ignore[misc]


def test_logits_are_the_definition() -> None:
    hidden, weight, bias = torch.randn(2, 3, H), torch.randn(V, H), torch.randn(V)
    want = 5 * torch.tanh(2 * (hidden @ weight.t() + bias) / 5)
    torch.testing.assert_close(Head(hidden, weight, bias, scale=2.0, softcap=5.0).logits(), want)
    torch.testing.assert_close(Head(hidden, weight).logits(), hidden @ weight.t())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float64])
def test_what_matmuls_are_in_on_a_gpu(storage: torch.dtype, autocast: torch.dtype | None) -> None:
    """Autocast's dtype but for float64, else 16 bits where the operands have them."""

    class OnGPU:
        device = torch.device("cuda")
        dtype = storage

    head = SimpleNamespace(input=OnGPU, weight=OnGPU, dtype=torch.promote_types(storage, torch.float32))
    narrow = storage if storage is torch.bfloat16 else None
    want = None if storage is torch.float64 else autocast or narrow
    assert _operand_dtype(head, autocast) is want  # type: ignore[arg-type]
