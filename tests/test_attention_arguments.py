"""What the losses on attention scores refuse, with the words of each message, and what they take."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attention_problems import PLAIN

import fastkd

Q, K = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 8, 16)
P = torch.zeros(2, 4, 8, 32), torch.zeros(2, 1, 8, 32)
MASK = torch.ones(2, 8, dtype=torch.bool)
X = [Q, Q, K]

REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "no_tensor": (TypeError, "q_s must be a tensor, got list", ([1.0], K, *P), {}),
    "integers": (
        TypeError,
        "k_s must be float16, bfloat16, float32 or float64, got torch.int64",
        (Q, K.long(), *P),
        {},
    ),
    "sparse": (
        TypeError,
        "k_t must be a dense (strided) tensor, got torch.sparse_coo",
        (Q, K, P[0], P[1].to_sparse()),
        {},
    ),
    "two_dims": (
        ValueError,
        "q_s must be (B, heads, tokens, dim) or (heads, tokens, dim), got (8, 16)",
        (Q[0, 0], K, *P),
        {},
    ),
    "other_ndim": (ValueError, "k_t must have as many dimensions as q_s, 4, got (1, 8, 32)", (Q, K, P[0], P[1][0]), {}),
    "device": (ValueError, "q_t must be on the student's device, cpu, got meta", (Q, K, P[0].to("meta"), P[1]), {}),
    "no_heads": (ValueError, "k_s must have heads and a head dimension, got (2, 0, 8, 16)", (Q, K[:, :0], *P), {}),
    "no_dim": (ValueError, "q_s must have heads and a head dimension, got (2, 4, 8, 0)", (Q[..., :0], K, *P), {}),
    "dtype": (TypeError, "k_s must have the dtype of q_s, torch.float32, got torch.float16", (Q, K.half(), *P), {}),
    "teacher_dtype": (
        TypeError,
        "k_t must have the dtype of q_t, torch.float32, got torch.bfloat16",
        (Q, K, P[0], P[1].bfloat16()),
        {},
    ),
    "batch": (ValueError, "q_t must have the batch size of q_s, 2, got (1, 4, 8, 32)", (Q, K, P[0][:1], P[1]), {}),
    "queries": (ValueError, "q_t must have the tokens of q_s, 8, got (2, 4, 7, 32)", (Q, K, P[0][:, :, :7], P[1]), {}),
    "keys": (ValueError, "k_t must have the tokens of k_s, 8, got (2, 1, 7, 32)", (Q, K, P[0], P[1][:, :, :7]), {}),
    "dim": (ValueError, "k_s must have the head dimension of q_s, 16, got 15", (Q, K[..., :15], *P), {}),
    "groups": (
        ValueError,
        "k_s must have a number of heads that divides that of q_s, 4, got 3",
        (Q, torch.zeros(2, 3, 8, 16), *P),
        {},
    ),
    "heads": (
        ValueError,
        "q_t must have the heads of q_s, 4, unless relation_heads says how many both have, got 2",
        (Q, K, P[0][:, :2], P[1]),
        {},
    ),
    "relation_heads": (
        ValueError,
        "relation_heads must divide the hidden size of q_s, 4 heads of 16, got 3",
        (Q, Q, *P),
        {"relation_heads": 3},
    ),
    "relation_heads_zero": (ValueError, "relation_heads must be positive, got 0", (Q, Q, *P), {"relation_heads": 0}),
    "relation_heads_type": (
        TypeError,
        "relation_heads must be an integer, got float",
        (Q, Q, *P),
        {"relation_heads": 2.0},
    ),
    "relation_of_two_sizes": (
        ValueError,
        "k_s must have the head dimension, once split, of q_s, 32, got 16",
        (Q, K, P[0], P[0]),
        {"relation_heads": 2},
    ),
    "causal": (
        ValueError,
        "causal must be False unless there are as many queries as keys, 8, got 7",
        (Q[:, :, :7], K, P[0][:, :, :7], P[1]),
        {"causal": True},
    ),
    "mask_type": (
        TypeError,
        "key_mask must be a tensor of bool, True for what takes part, got torch.float32",
        (Q, K, *P),
        {"key_mask": MASK.float()},
    ),
    "mask_list": (
        TypeError,
        "query_mask must be a tensor of bool, True for what takes part, got list",
        (Q, K, *P),
        {"query_mask": [True]},
    ),
    "mask_shape": (ValueError, "key_mask must have the shape (2, 8), got (8,)", (Q, K, *P), {"key_mask": MASK[0]}),
    "mask_shape_flat": (
        ValueError,
        "query_mask must have the shape (8,), got (2, 8)",
        (Q[0], K[0], P[0][0], P[1][0]),
        {"query_mask": MASK},
    ),
    "mask_device": (
        ValueError,
        "query_mask must be on the student's device, cpu, got meta",
        (Q, K, *P),
        {"query_mask": MASK.to("meta")},
    ),
    "scale": (ValueError, "scale must be positive and finite in float32, got 0.0", (Q, K, *P), {"scale": 0}),
    "scale_infinite": (
        ValueError,
        "teacher_scale must be positive and finite in float32, got 1e+39",
        (Q, K, *P),
        {"teacher_scale": 1e39},
    ),
    "causal_type": (TypeError, "causal must be a bool, got str", (Q, K, *P), {"causal": "no"}),
    "scale_type": (TypeError, "scale must be a number, got str", (Q, K, *P), {"scale": "1"}),
    "reduction": (
        ValueError,
        "reduction must be one of none, sum, mean, batchmean, got 'rows'",
        (Q, K, *P),
        {"reduction": "rows"},
    ),
    "impl": (ValueError, "impl must be one of triton, native, reference, got 'cuda'", (Q, K, *P), {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_message(case: str) -> None:
    error, message, args, options = REFUSED[case]
    with pytest.raises(error, match="^" + re.escape(f"attention_kl_loss: {message}") + "$"):
        fastkd.attention_kl_loss(*args, **options)


MINILM_REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "a_tensor": (TypeError, "student must be a sequence of tensors, got Tensor", (Q, X), {}),
    "none": (ValueError, "teacher must have a tensor, got none", (X, []), {}),
    "count": (ValueError, "teacher must have as many tensors as the student, 3, got 2", (X, X[:2]), {}),
    "weights": (ValueError, "weights must have one number for each relation, 3, got 1", (X, X), {"weights": [1.0]}),
    "weights_type": (TypeError, "weights must be a sequence of numbers, got float", (X, X), {"weights": 1.0}),
    "no_heads": (TypeError, "relation_heads must be an integer, got NoneType", (X, X), {"relation_heads": None}),
    "weight": (ValueError, "weights must be finite, got nan", (X, X), {"weights": [1.0, float("nan"), 1.0]}),
    "split": (
        ValueError,
        "relation_heads must divide the hidden size of q_s, 2 heads of 16, got 64",
        (X, X),
        {"relation_heads": 64},
    ),
    "reduction": (
        ValueError,
        "reduction must be one of none, sum, mean, batchmean, got None",
        (X, X),
        {"reduction": None},
    ),
}


@pytest.mark.parametrize("case", MINILM_REFUSED)
def test_message_of_minilm(case: str) -> None:
    error, message, args, options = MINILM_REFUSED[case]
    with pytest.raises(error, match="^" + re.escape(f"minilm_loss: {message}") + "$"):
        fastkd.minilm_loss(*args, **{"relation_heads": 4, **options})


def test_a_pin_is_refused_and_never_replaced() -> None:
    q = Q.double()
    message = "attention_kl_loss: impl='native' cannot run here: no kernel computes float64"
    with pytest.raises(RuntimeError, match=message):
        fastkd.attention_kl_loss(q, q, *P, impl="native")
    with pytest.raises(RuntimeError, match=message):
        fastkd.attention_kl_loss(Q, Q, q, q, impl="native")


def test_result_dtype() -> None:
    half = Q.half().requires_grad_()
    loss = fastkd.attention_kl_loss(half, K.half(), *P)
    assert loss.dtype is torch.float32
    (grad,) = torch.autograd.grad(loss, half)
    assert grad.dtype is torch.float16
    assert fastkd.attention_kl_loss(Q, K, P[0].double(), P[1].double()).dtype is torch.float64


def test_the_options_of_the_modules_are_those_of_the_functions() -> None:
    import inspect

    from fastkd.losses.attention import AttentionKLOptions, MiniLMOptions

    for function, options in ((fastkd.attention_kl_loss, AttentionKLOptions), (fastkd.minilm_loss, MiniLMOptions)):
        parameters = inspect.signature(function).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(options.__annotations__)


def test_modules_hold_options() -> None:
    q_s, k_s, q_t, k_t = PLAIN.tensors()
    module = fastkd.AttentionKLLoss(causal=True, reduction="sum")
    assert repr(module) == "AttentionKLLoss(causal=True, reduction='sum')"
    want = fastkd.attention_kl_loss(q_s, k_s, q_t, k_t, causal=True)
    assert torch.equal(module(q_s, k_s, q_t, k_t, reduction="mean"), want)
    relations = fastkd.MiniLMLoss(relation_heads=4)
    assert repr(relations) == "MiniLMLoss(relation_heads=4)"
    student, teacher = (q_s, k_s), (q_t, k_t)
    assert torch.equal(relations(student, teacher), fastkd.minilm_loss(student, teacher, relation_heads=4))
    with pytest.raises(TypeError, match="AttentionKLLoss: heads must be a keyword argument of attention_kl_loss"):
        fastkd.AttentionKLLoss(heads=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="MiniLMLoss: scale must be a keyword argument of minilm_loss"):
        fastkd.MiniLMLoss(scale=2)  # type: ignore[call-arg]


def test_shapes_without_numbers() -> None:
    q_s, k_s, q_t, k_t = (x.to("meta") for x in PLAIN.tensors())
    leaf = q_s.requires_grad_()
    loss = fastkd.attention_kl_loss(leaf, k_s, q_t, k_t)
    loss.backward()
    assert loss.is_meta
    assert leaf.grad is not None
    assert leaf.grad.shape == q_s.shape
