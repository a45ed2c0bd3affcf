"""What losses on features refuse, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fastkd

ROWS = (fastkd.gram_loss, fastkd.cosine_relation_loss, fastkd.similarity_preserving_loss, fastkd.cka_loss)
MAPS = (fastkd.attention_transfer_loss, fastkd.nst_loss)
X, M = torch.zeros(4, 3), torch.zeros(4, 3, 2, 2)


@pytest.mark.parametrize("loss", [*ROWS, *MAPS, fastkd.hint_loss])
def test_what_features_are(loss: Callable[..., Tensor]) -> None:
    op, x = loss.__name__, M if loss in MAPS else X
    for bad, kind, rule, got in (
        ([1.0], TypeError, "be a tensor", "list"),
        (x.long(), TypeError, "be float16, bfloat16, float32 or float64", "torch.int64"),
        (x.to_sparse(), TypeError, "be a dense (strided) tensor", "torch.sparse_coo"),
    ):
        for argument, pair in (("student", (bad, x)), ("teacher", (x, bad))):
            with pytest.raises(kind, match=f"^{re.escape(f'{op}: {argument} must {rule}, got {got}')}$"):
                loss(*pair)
    with pytest.raises(ValueError, match=rf"^{op}: teacher must be on the student's device, cpu, got meta$"):
        loss(x, x.to("meta"))


CASES: list[tuple[Callable[..., Any], str, str]] = [
    *[
        (partial(loss, torch.zeros(3), X), loss.__name__, "student must have the shape (N, D), got (3,)")
        for loss in ROWS
    ],
    *[(partial(loss, X, M), loss.__name__, "teacher must have the shape (N, D), got (4, 3, 2, 2)") for loss in ROWS],
    *[
        (partial(loss, X, X[:3]), loss.__name__, "teacher must have as many rows as the student, 4, got 3")
        for loss in ROWS
    ],
    *[
        (partial(loss, X, X, reduction="none"), loss.__name__, "reduction must be one of mean, sum, got 'none'")
        for loss in ROWS[:3]
    ],
    *[
        (partial(loss, M, M, reduction="none"), loss.__name__, "reduction must be one of mean, sum, got 'none'")
        for loss in MAPS
    ],
    *[
        (partial(loss, X, M), loss.__name__, "student must have the shape (N, C, positions...), got (4, 3)")
        for loss in MAPS
    ],
    *[
        (
            partial(loss, M, other),
            loss.__name__,
            f"teacher must have as many samples and dimensions as the student, (4, 3, 2, 2), got {tuple(other.shape)}",
        )
        for loss in MAPS
        for other in (M[:3], M[..., 0])
    ],
    (
        partial(fastkd.similarity_preserving_loss, X, X, norm="L2"),
        "similarity_preserving_loss",
        "norm must be one of l2, l1, got 'L2'",
    ),
    (
        partial(fastkd.attention_transfer_loss, M, M, convention="torchdistill"),
        "attention_transfer_loss",
        "convention must be one of code, paper, got 'torchdistill'",
    ),
    (
        partial(fastkd.attention_transfer_loss, M, M, p=0.5),
        "attention_transfer_loss",
        "p must be finite and at least 1, got 0.5",
    ),
    (partial(fastkd.hint_loss, X, X[:, :2]), "hint_loss", "teacher must have the student's shape, (4, 3), got (4, 2)"),
    (
        partial(fastkd.hint_loss, X, X, distance="l2"),
        "hint_loss",
        "distance must be one of mse, l1, huber, cosine, got 'l2'",
    ),
    (
        partial(fastkd.hint_loss, X[0, 0], X[0, 0], distance="cosine"),
        "hint_loss",
        'student must have a dimension for distance="cosine", got a 0-dim tensor',
    ),
    (
        partial(fastkd.gram_loss, X, X, reduction=numpy.array([1])),
        "gram_loss",
        "reduction must be one of mean, sum, got array([1])",
    ),
    (partial(fastkd.hint_loss, X, X, delta=0), "hint_loss", "delta must be positive and finite in float32, got 0.0"),
    (
        partial(fastkd.hint_loss, X, X, mask=torch.ones(4).bool()),
        "hint_loss",
        "mask must broadcast to the student's shape, (4, 3), got (4,)",
    ),
    (
        partial(fastkd.hint_loss, X, X, mask=torch.ones(1, 4, 3).bool()),
        "hint_loss",
        "mask must broadcast to the student's shape, (4, 3), got (1, 4, 3)",
    ),
    (
        partial(fastkd.hint_loss, X, X, distance="cosine", mask=torch.ones(4, 3).bool()),
        "hint_loss",
        'mask must have a last dimension of size 1 for distance="cosine", got (4, 3)',
    ),
    (
        partial(fastkd.hint_loss, X, X, mask=torch.ones(4, 1, device="meta").bool()),
        "hint_loss",
        "mask must be on the student's device, cpu, got meta",
    ),
]


@pytest.mark.parametrize(("call", "op", "words"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_values(call: Callable[..., Any], op: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {words}')}$"):
        call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": [True]}, "mask must be a bool tensor, got list"),
        ({"mask": torch.ones(4, 1)}, "mask must be a bool tensor, got torch.float32"),
        ({"delta": "1"}, "delta must be a number, got str"),
        ({"impl": 3}, "impl must be a name or None, got int"),
    ],
)
def test_wrong_types(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'hint_loss: {words}')}$"):
        fastkd.hint_loss(X, X, **options)


def test_a_pin_is_obeyed_or_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^hint_loss: impl='native' cannot run here: no kernel computes float64"):
        fastkd.hint_loss(X.double(), X, impl="native")
    with pytest.raises(RuntimeError, match=r"^nst_loss: impl='native' cannot run here: there is no fastkd.native.nst"):
        fastkd.nst_loss(M, M, impl="native")
    with pytest.raises(
        RuntimeError, match=r"^gram_loss: impl='triton' cannot run here: there is no fastkd_kernels.gram"
    ):
        fastkd.gram_loss(X, X, impl="triton")
