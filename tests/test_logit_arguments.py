"""Every refusal of the logit losses, with its message: <op>: <argument> must <rule>, got <value>."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.losses.logit import KDOptions

SEVERAL_LOGITS = "a tensor of logits, a Head, a TopK or an Expected, or a sequence of them"
S, T, Y = torch.zeros(8, 100), torch.zeros(8, 100), torch.zeros(8, dtype=torch.long)

REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "student_type": (TypeError, "kd_loss: student must be a tensor of logits or a Head, got list", ([1.0], T), {}),
    "student_dtype": (
        TypeError,
        "kd_loss: student must be float16, bfloat16, float32 or float64, got torch.int64",
        (S.long(), T),
        {},
    ),
    "student_sparse": (
        TypeError,
        "kd_loss: student must be a dense (strided) tensor, got torch.sparse_coo",
        (S.to_sparse(), T),
        {},
    ),
    "student_0_dim": (ValueError, "kd_loss: student must have a class dimension, got a 0-dim tensor", (S[0, 0], T), {}),
    "no_classes": (
        ValueError,
        "kd_loss: student must have at least one class, got shape (8, 0)",
        (S[:, :0], T[:, :0]),
        {},
    ),
    "teacher_type": (
        TypeError,
        f"kd_loss: teacher must be {SEVERAL_LOGITS}, got str",
        (S, "teacher"),
        {},
    ),
    "teacher_in_sequence": (
        TypeError,
        f"kd_loss: teacher must be {SEVERAL_LOGITS}, got NoneType",
        (S, [T, None]),
        {},
    ),
    "no_teacher": (ValueError, "kd_loss: teacher must hold at least one tensor, got an empty sequence", (S, []), {}),
    "teacher_dtype": (
        TypeError,
        "kd_loss: teacher must be float16, bfloat16, float32 or float64, got torch.bool",
        (S, T.bool()),
        {},
    ),
    "teacher_rows": (
        ValueError,
        "kd_loss: teacher must have the student's shape, (8, 100), got (7, 100)",
        (S, T[:7]),
        {},
    ),
    "teacher_ndim": (ValueError, "kd_loss: teacher must have the student's shape, (8, 100), got (100,)", (S, T[0]), {}),
    "teacher_vocabulary": (
        ValueError,
        "kd_loss: teacher must have the student's vocabulary, unless shared_vocab or vocab_map is given, got 99 for a"
        " student of 100",
        (S, T[:, :99]),
        {},
    ),
    "teacher_device": (
        ValueError,
        "kd_loss: teacher must be on the student's device, cpu, got meta",
        (S, T.to("meta")),
        {},
    ),
    "target_type": (TypeError, "kd_loss: target must be a tensor of class ids, got list", (S, T, [0] * 8), {}),
    "target_dtype": (
        TypeError,
        "kd_loss: target must hold integer class ids, got torch.float32",
        (S, T, Y.float()),
        {},
    ),
    "target_shape": (ValueError, "kd_loss: target must have the shape of the rows, (8,), got (7,)", (S, T, Y[:7]), {}),
    "target_id": (
        ValueError,
        "kd_loss: target must hold ids from 0 to 99, or ignore_index=-100, got 100",
        (S, T, Y + 100),
        {},
    ),
    "divergence": (
        ValueError,
        "kd_loss: divergence must be one of forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, cross_entropy, "
        "mse, got 'kl'",
        (S, T),
        {"divergence": "kl"},
    ),
    "beta_untaken": (
        ValueError,
        "kd_loss: beta must be None for forward_kl (only jsd, skew_kl, skew_reverse_kl take it), got 0.5",
        (S, T),
        {"beta": 0.5},
    ),
    "beta_end_of_jsd": (
        ValueError,
        'kd_loss: beta must be between 0 and 1 for jsd (its ends are 0 everywhere: divergence="forward_kl" or '
        '"reverse_kl"), got 1.0',
        (S, T),
        {"divergence": "jsd", "beta": 1},
    ),
    "beta_of_skew": (
        ValueError,
        "kd_loss: beta must be from 0 to below 1 for skew_kl, got 1.0",
        (S, T),
        {"divergence": "skew_kl", "beta": 1.0},
    ),
    "beta_nan": (
        ValueError,
        "kd_loss: beta must be finite, got nan",
        (S, T),
        {"divergence": "jsd", "beta": float("nan")},
    ),
    "temperature": (
        ValueError,
        "kd_loss: temperature must be positive and finite in float32, got 0.0",
        (S, T),
        {"temperature": 0},
    ),
    "temperature_nan": (
        ValueError,
        "kd_loss: temperature must be positive and finite in float32, got nan",
        (S, T),
        {"temperature": float("nan")},
    ),
    "temperature_type": (
        TypeError,
        "kd_loss: temperature must be a number or a tensor with one number per row, got str",
        (S, T),
        {"temperature": "2"},
    ),
    "temperature_shape": (
        ValueError,
        "kd_loss: temperature must have the shape of the rows, (8,), got (3,)",
        (S, T),
        {"temperature": torch.ones(3)},
    ),
    "temperature_gradient": (
        ValueError,
        "kd_loss: temperature must not require a gradient (it would get none): pass argument.detach(), got "
        "requires_grad=True",
        (S, T),
        {"temperature": torch.ones(8, requires_grad=True)},
    ),
    "temperature_of_a_row": (
        ValueError,
        "kd_loss: temperature must be positive and finite in every row, got -1.0",
        (S, T),
        {"temperature": torch.linspace(7, -1, 8)},
    ),
    "teacher_temperature_of_a_row": (
        ValueError,
        "kd_loss: teacher_temperature must be positive and finite in every row, got 0.0",
        (S, T),
        {"teacher_temperature": torch.zeros(8)},
    ),
    "teacher_temperatures": (
        ValueError,
        "kd_loss: teacher_temperature must hold one number per teacher, 1, got 2",
        (S, T),
        {"teacher_temperature": [1.0, 2.0]},
    ),
    "alpha": (ValueError, "kd_loss: alpha must be from 0 to 1, got 1.5", (S, T, Y), {"alpha": 1.5}),
    "alpha_gradient": (
        ValueError,
        "kd_loss: alpha must not require a gradient",
        (S, T, Y),
        {"alpha": torch.ones(8, requires_grad=True)},
    ),
    "label_smoothing": (
        ValueError,
        "kd_loss: label_smoothing must be from 0 to 1, got -0.1",
        (S, T, Y),
        {"label_smoothing": -0.1},
    ),
    "z_loss": (ValueError, "kd_loss: z_loss must be finite and not negative, got -1.0", (S, T, Y), {"z_loss": -1}),
    "ignore_index": (
        TypeError,
        "kd_loss: ignore_index must be an integer, got float",
        (S, T, Y),
        {"ignore_index": -1.0},
    ),
    "row_weight_type": (
        TypeError,
        "kd_loss: row_weight must be a tensor with one number per row, got float",
        (S, T),
        {"row_weight": 1.0},
    ),
    "row_weight_gradient": (
        ValueError,
        "kd_loss: row_weight must not require a gradient",
        (S, T),
        {"row_weight": torch.ones(8, requires_grad=True)},
    ),
    "row_weight_complex": (
        TypeError,
        "kd_loss: row_weight must be real, got torch.complex64",
        (S, T),
        {"row_weight": torch.ones(8, dtype=torch.complex64)},
    ),
    "teacher_weight": (
        ValueError,
        "kd_loss: teacher_weight must hold one number per teacher, 2, got (1.0,)",
        (S, [T, T]),
        {"teacher_weight": (1.0,)},
    ),
    "teacher_weight_shape": (
        ValueError,
        "kd_loss: teacher_weight must have shape (2,) or (8, 2), got (2, 8)",
        (S, [T, T]),
        {"teacher_weight": torch.ones(2, 8)},
    ),
    "shared_vocab": (
        ValueError,
        "kd_loss: shared_vocab must be from 1 to 99, the smallest vocabulary, got 100",
        (S, T[:, :99]),
        {"shared_vocab": 100},
    ),
    "shared_vocab_type": (
        TypeError,
        "kd_loss: shared_vocab must be an integer, got float",
        (S, T),
        {"shared_vocab": 5.0},
    ),
    "reduction": (
        ValueError,
        "kd_loss: reduction must be one of none, sum, mean, batchmean, got 'avg'",
        (S, T),
        {"reduction": "avg"},
    ),
    "batchmean_without_a_batch": (
        ValueError,
        'kd_loss: student must have a batch dimension for reduction="batchmean", got dim=0',
        (S[0], T[0]),
        {"reduction": "batchmean"},
    ),
    "normalizer_of_none": (
        ValueError,
        'kd_loss: normalizer must be None with reduction="none", got 3',
        (S, T),
        {"reduction": "none", "normalizer": 3},
    ),
    "normalizer": (
        ValueError,
        "kd_loss: normalizer must be finite and not negative, got -1.0",
        (S, T),
        {"normalizer": -1},
    ),
    "normalizer_shape": (
        ValueError,
        "kd_loss: normalizer must be a number or a 0-dim tensor, got shape (1,)",
        (S, T),
        {"normalizer": torch.ones(1)},
    ),
    "normalizer_tensor": (
        ValueError,
        "kd_loss: normalizer must be finite and not negative, got -3.0",
        (S, T),
        {"normalizer": torch.tensor(-3.0)},
    ),
    "temperature_infinite_in_a_row": (
        ValueError,
        "kd_loss: teacher_temperature must be positive and finite in every row, got inf",
        (S, T),
        {"teacher_temperature": torch.full((8,), torch.inf)},
    ),
    "temperature_beyond_float32": (
        ValueError,
        "kd_loss: temperature must be positive and finite in float32, got inf",
        (S, T),
        {"temperature": 10**400},
    ),
    "temperature_array": (
        TypeError,
        "kd_loss: temperature must be a number or a tensor with one number per row, got ndarray",
        (S, T),
        {"temperature": np.array([2.0])},
    ),
    "ignore_index_of_65_bits": (
        ValueError,
        "kd_loss: ignore_index must fit in 64 bits, got 9223372036854775808",
        (S, T, Y),
        {"ignore_index": 2**63},
    ),
    "impl_type": (TypeError, "kd_loss: impl must be a name or None, got list", (S, T), {"impl": ["native"]}),
    **{
        f"{name}_device": (
            ValueError,
            f"kd_loss: {name} must be on the student's device, cpu, got meta",
            (S, T, *((Y.to("meta"),) if name == "target" else ())),
            {} if name == "target" else {name: torch.ones(shape, device="meta")},
        )
        for name, shape in {"target": 8, "row_weight": 8, "temperature": 8, "normalizer": ()}.items()
    },
    "dim": (ValueError, "kd_loss: dim must be an integer from -2 to 1, got 2", (S, T), {"dim": 2}),
    "impl": (
        ValueError,
        "kd_loss: impl must be one of triton, native, reference, got 'cuda'",
        (S, T),
        {"impl": "cuda"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_message(case: str) -> None:
    error, message, args, options = REFUSED[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        fastkd.kd_loss(*args, **options)


@pytest.mark.parametrize("pinned", ["reference", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize(
    "case",
    [
        "target_id",
        "temperature_of_a_row",
        "teacher_temperature_of_a_row",
        "temperature_infinite_in_a_row",
        "normalizer_tensor",
    ],
)
def test_data_is_checked_by_every_cpu_implementation(pinned: str, case: str) -> None:
    error, message, args, options = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        fastkd.kd_loss(*args, **options, impl=pinned)


def test_a_pin_is_refused_and_never_replaced() -> None:
    wide = S.double()
    message = "kd_loss: impl='native' cannot run here: no kernel computes float64; what can: reference"
    with pytest.raises(RuntimeError, match=message):
        fastkd.kd_loss(wide, wide, impl="native")


def test_cross_entropy_names_itself() -> None:
    with pytest.raises(ValueError, match=r"^cross_entropy: target must have the shape of the rows, \(8,\), got \(7,\)"):
        fastkd.cross_entropy(S, Y[:7])
    with pytest.raises(ValueError, match=r"^cross_entropy: target must hold ids from 0 to 99, or ignore_index=-1, got"):
        fastkd.cross_entropy(S, Y - 100, ignore_index=-1)


def test_the_options_of_the_module_are_those_of_the_function() -> None:
    import inspect

    parameters = inspect.signature(fastkd.kd_loss).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords - {"return_parts"} == set(KDOptions.__annotations__)


def test_result_dtype() -> None:
    assert fastkd.kd_loss(S.half(), T.bfloat16()).dtype is torch.float32
    assert fastkd.kd_loss(S.double(), T).dtype is torch.float64
    assert fastkd.kd_loss(S, T.double()).dtype is torch.float64
    leaf = S.bfloat16().requires_grad_()
    fastkd.kd_loss(leaf, T.double(), Y).backward()
    assert isinstance(leaf.grad, Tensor)
    assert leaf.grad.dtype is torch.bfloat16


def test_number_like_arguments() -> None:
    """0-dim tensors, numpy numbers and integers are numbers."""
    import numpy as np

    student, teacher = torch.randn(8, 100), torch.randn(8, 100)
    want = fastkd.kd_loss(student, teacher, Y, temperature=2.0, alpha=0.25)
    for temperature, alpha in ((2, np.float32(0.25)), (np.int64(2), torch.tensor(0.25)), (torch.tensor(2.0), 0.25)):
        got = fastkd.kd_loss(student, teacher, Y.int(), temperature=temperature, alpha=alpha)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
