"""The Triton launchers called directly: what they may read and write, how rows are cut, what they keep in the state.

The losses themselves are compared with the reference in ``test_logit.py``. With a GPU these tests run on it, else in
Triton's interpreter, where short rows already have unmasked steps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastkd import _rows
from fastkd._rows import LogitRows
from fastkd.reference import logit as reference
from fastkd.testing import assert_as_exact_as_fp32, flat_logits, peaked_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1", allow_module_level=True)

from fastkd_kernels import divergences, logit, rows  # noqa: E402

LONG = 20_011 if DEVICE == "cuda" else 151  # a few unmasked steps, a head, a tail, and an odd length
INF, NAN = float("inf"), float("nan")
TWO_PASS = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """numpy, which interprets, warns of the infinities that a device takes as they come."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def problem(student: Tensor, *teachers: Tensor, **fields: Any) -> LogitRows:
    n, vocabulary = student.shape
    temperature = 1.0 if fields.get("divergence") == "mse" else 1.5
    labels = torch.arange(n, device=student.device) * 7919 % vocabulary
    values: dict[str, Any] = {
        "student": student,
        "teachers": teachers,
        "target": labels,
        "row_weight": None,
        "alpha": 0.3 if teachers else 1.0,
        "temperature": temperature,
        "teacher_temperature": (fields.get("temperature", temperature),) * len(teachers),
        "teacher_weight": tuple(0.75 / (1 + k) for k in range(len(teachers))),
        "divisor": None,
        "divergence": "forward_kl",
        "beta": 0.3,
        "scale_by_t2": True,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "ignore_index": -100,
        "shared": vocabulary,
        "reduce": False,
        "agreement": False,
        "overwrite": False,
    }
    return LogitRows(**values | fields)


def make(
    n: int = 3, vocabulary: int = LONG, teachers: int = 1, dtype: torch.dtype = torch.float32, **fields: Any
) -> LogitRows:
    student = peaked_logits(n, vocabulary, seed=1, dtype=dtype).to(DEVICE)
    others = (flat_logits(n, vocabulary, seed=2 + k, dtype=dtype).to(DEVICE) for k in range(teachers))
    return problem(student, *others, **fields)


def upstream(rows: LogitRows) -> Tensor:
    return torch.ones((), device=DEVICE) if rows.reduce else torch.linspace(0.5, 1.5, len(rows.student), device=DEVICE)


def both_ways(implementation: Any, rows: LogitRows) -> tuple[Tensor, Tensor]:
    loss, state, scale = implementation.forward(rows)
    return loss, implementation.backward(rows, state, scale, upstream(rows).to(loss.dtype))


def check(rows: LogitRows) -> None:
    """Value and gradient within the bar of the tests of every implementation."""

    def compute(student: Tensor, *teachers: Tensor) -> tuple[Tensor, Tensor]:
        return both_ways(reference, replace(rows, student=student, teachers=teachers, overwrite=False))

    student = rows.student.clone()
    got = both_ways(logit, rows)
    assert_as_exact_as_fp32(got, compute, student, *rows.teachers)


def test_the_state_has_the_contracts_columns() -> None:
    names = ["WEIGHT", "STUDENT_MAX", "STUDENT_LOGSUM", "HARD_MAX", "HARD_LOGSUM", "TARGET_AGREES", "TEACHER_AGREES"]
    names += ["FIRST_TEACHER", "TEACHER_COLUMNS"]
    assert {name: getattr(rows, name).value for name in names} == {name: getattr(_rows, name) for name in names}
    assert (rows.HARD_TERM.value, rows.SOFT_TERM.value) == (_rows.HARD, _rows.SOFT)


@pytest.mark.parametrize("divergence", _rows.DIVERGENCES)
def test_every_column_of_the_state_is_the_references(divergence: str) -> None:
    rows = make(
        teachers=2, divergence=divergence, shared=LONG - 20, agreement=True, label_smoothing=0.1, z_loss=0.01,
        row_weight=torch.tensor([2.0, 0.0, 0.5], device=DEVICE), scale_by_t2=False,
    )  # fmt: skip
    # A teacher that agrees with the student, on ids where one of them ties.
    rows.teachers[0].copy_(rows.student)
    rows.student[0, 3] = rows.student[0, LONG - 5] = rows.student[0].max() + 1
    rows.teachers[1][2, 5] = rows.teachers[1][2, 70] = 9.0
    rows.target[0] = 3
    loss, state, scale = logit.forward(rows)
    for got, want in zip((loss, state, scale), reference.forward(rows), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert state[:, _rows.TARGET_AGREES].tolist() == [1.0, 0.0, 0.0]
    assert state[2, _rows.TEACHER_AGREES] == 0.75


@pytest.mark.parametrize("divergence", _rows.DIVERGENCES)
def test_either_forward_feeds_either_backward(divergence: str) -> None:
    rows = make(2, divergence=divergence, reduce=True)
    gradients = []
    for ahead in (logit, reference):
        _, state, scale = ahead.forward(rows)
        gradients += [behind.backward(rows, state, scale, upstream(rows)) for behind in (logit, reference)]
    for gradient in gradients[:-1]:
        torch.testing.assert_close(gradient, gradients[-1], rtol=1e-4, atol=1e-6)


def guarded(x: Tensor, stride: int, offset: int) -> tuple[Tensor, Tensor]:
    """x in a buffer of NaN: rows ``stride`` apart, the first one ``offset`` elements in; and the buffer."""
    n, vocabulary = x.shape
    buffer = torch.full((offset + n * stride + 64,), NAN, dtype=x.dtype, device=x.device)
    view = buffer.as_strided((n, vocabulary), (stride, 1), offset)
    view.copy_(x)
    return view, buffer


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "extra", "offset", "teacher_offset"),
    [(dtype, vocabulary, *place) for dtype in STORAGE for vocabulary, *place in ((7, 3, 65, 65), (LONG, 5, 69, 69))]
    + [(torch.bfloat16, 1, 0, 64, 64), (torch.bfloat16, 64, 0, 64, 64), (torch.bfloat16, 65, 5, 71, 64)],
)
def test_nothing_outside_a_row_is_used_or_written(
    dtype: torch.dtype, vocabulary: int, extra: int, offset: int, teacher_offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make(2, vocabulary, dtype=dtype, temperature=1.0)
    student, _ = guarded(rows.student, vocabulary + extra, offset)
    teacher, _ = guarded(rows.teachers[0], vocabulary + extra, teacher_offset)
    expected = both_ways(logit, rows)
    for overwrite in (False, True):
        gradient, buffer = guarded(student, vocabulary + extra, offset)
        around = buffer.clone()
        around.as_strided(gradient.shape, gradient.stride(), offset).fill_(0)
        monkeypatch.setattr(logit, "_like", lambda _, gradient=gradient: gradient)
        strided = replace(rows, student=gradient if overwrite else student, teachers=(teacher,), overwrite=overwrite)
        loss, got = both_ways(logit, strided)
        assert got.data_ptr() == gradient.data_ptr()
        # A row that is read id by id, or from another boundary, adds up in another order.
        torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, expected[1], rtol=1e-2, atol=1e-5)
        gradient.fill_(0)
        assert torch.equal(buffer.isnan(), around.isnan())


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_a_gradients_rows_begin_where_the_students_do(dtype: torch.dtype) -> None:
    for stride in (LONG, LONG + 1, LONG + 5):
        student = torch.zeros(3, stride, dtype=dtype)[:, :LONG]
        gradient = logit._like(student)
        assert gradient.shape == student.shape
        assert (gradient.stride(0) - student.stride(0)) % (16 // dtype.itemsize) == 0
        assert gradient.is_contiguous() == ((stride - LONG) % (16 // dtype.itemsize) == 0)
        later = student[1:, 3:]
        assert (logit._like(later).data_ptr() - later.data_ptr()) % 16 == 0


@pytest.mark.parametrize("divergence", _rows.DIVERGENCES)
def test_a_row_in_parts(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make(2, divergence=divergence, shared=LONG - 40, agreement=True)
    # One row begins, and one ends its shared ids, with a part that has no logit above -inf.
    for side in (rows.student, *rows.teachers):
        side[0, : LONG // 2 + 5], side[1, LONG // 3 : LONG - 40] = -INF, -INF
    smooth = make(2, divergence=divergence, label_smoothing=0.1)
    for one in (rows, smooth):
        monkeypatch.setattr(logit, "_parts", lambda *_: 1)
        whole = logit.forward(one)
        monkeypatch.setattr(logit, "_parts", lambda *_: 3)
        for got, want in zip(logit.forward(one), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    check(smooth)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_same_bits_twice(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit, "_parts", lambda *_: parts)
    rows = make(2, divergence="jsd", teachers=2, reduce=True, label_smoothing=0.1)
    first, second = (both_ways(logit, rows) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "mse"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_teacher_of_another_dtype(divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student = peaked_logits(2, LONG, seed=1, dtype=dtypes[0]).to(DEVICE)
    check(problem(student, flat_logits(2, LONG, seed=2, dtype=dtypes[1]).to(DEVICE), divergence=divergence))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_one_number_a_row_is_that_number(divergence: str) -> None:
    numbers: dict[str, Any] = {"alpha": 0.25, "temperature": 2.5}
    given = make(
        teachers=2, divergence=divergence, teacher_temperature=(1.5, 0.5), teacher_weight=(0.5, 2.0), **numbers
    )
    each = replace(
        given,
        **{name: torch.full((3,), numbers[name], device=DEVICE) for name in ("alpha", "temperature")},
        teacher_temperature=(1.5, torch.full((3,), 0.5, device=DEVICE)),
        teacher_weight=torch.tensor([[0.5, 2.0]], device=DEVICE).expand(3, 2),
        row_weight=torch.ones(4, device=DEVICE)[1:],
    )
    for got, want in zip(both_ways(logit, each), both_ways(logit, given), strict=True):
        assert torch.equal(got, want)


def columns(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("divergence", _rows.DIVERGENCES)
def test_a_weight_of_0_silences_anything(divergence: str) -> None:
    """Row by row: ignored, weight 0, no hard term, no soft term, no second teacher; with NaN in what is silent."""
    quiet = replace(
        make(5, teachers=2, divergence=divergence, agreement=True),
        row_weight=columns(1, 0, 2, 1, 1),
        alpha=columns(0.5, 0.5, 0, 1, 0.5),
        temperature=columns(NAN, -1, 2, NAN, 2),
        teacher_temperature=(1.5, columns(1, 0, 1, NAN, NAN)),
        teacher_weight=torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 1], [1, 0]], device=DEVICE),
        shared=LONG - 30,
    )
    quiet.target[0] = -100
    noisy = replace(
        quiet,
        student=quiet.student.clone(),
        teachers=tuple(t.clone() for t in quiet.teachers),
        target=quiet.target.clone(),
    )
    noisy.student[0], noisy.student[1, ::2], noisy.target[1] = NAN, INF, LONG + 1000
    noisy.student[2, LONG - 30 :] = NAN  # beyond the shared ids, where the hard term alone looks
    for teacher in noisy.teachers:
        teacher[0], teacher[1, ::3], teacher[3] = NAN, INF, NAN
    noisy.teachers[1][4] = NAN
    loss, gradient = both_ways(logit, noisy)

    def positive(temperatures: Tensor) -> Tensor:
        return torch.where(temperatures > 0, temperatures, 1.0)

    want = both_ways(
        reference,
        replace(
            quiet,
            temperature=positive(quiet.temperature),
            teacher_temperature=(1.5, positive(quiet.teacher_temperature[1])),
        ),
    )
    torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want[1], rtol=1e-4, atol=1e-6)
    assert loss[:2].tolist() == [0, 0]
    assert not gradient[:2].any()
    assert gradient[2:].abs().amax(-1).min() > 1e-3


SPOILT = {
    "nan student": (0, 60, NAN), "nan teacher": (1, 60, NAN), "inf student": (0, 60, INF), "inf teacher": (1, 60, INF),
    "no student": (0, slice(None), -INF), "no teacher": (1, slice(None), -INF),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("divergence", _rows.DIVERGENCES)
def test_an_unusable_row_is_nan_and_harms_no_other(divergence: str, spoilt: str) -> None:
    rows = make(3, 90, divergence=divergence)
    want = both_ways(logit, rows)
    side, ids, value = SPOILT[spoilt]
    (rows.student, *rows.teachers)[side][1, ids] = value
    loss, gradient = both_ways(logit, rows)
    assert loss[1].isnan()
    for got, expected in ((loss, want[0]), (gradient, want[1])):
        assert torch.equal(got[::2], expected[::2])


@pytest.mark.parametrize("divergence", _rows.DIVERGENCES)
def test_infinities_are_decided_by_the_logits(divergence: str) -> None:
    """One side at -inf where the other is not; in the second and fourth row its probability underflows to 0."""
    rows = make(5, divergence=divergence, alpha=0.0, target=None)
    rows.student[0, 9], rows.student[1, 9], rows.teachers[0][1, 9] = -INF, -INF, -1e6
    rows.teachers[0][2, 9], rows.teachers[0][3, 9], rows.student[3, 9] = -INF, -INF, -1e6
    rows.student[4, 40:80], rows.teachers[0][4, 40:80] = -INF, -INF
    loss, gradient = both_ways(logit, rows)
    infinite = {
        "forward_kl": [True, True, False, False, False],
        "cross_entropy": [True, True, False, False, False],
        "reverse_kl": [False, False, True, True, False],
        "mse": [True, True, True, True, False],
    }.get(divergence, [False] * 5)
    assert (loss == INF).tolist() == infinite
    assert gradient.isfinite().all()
    keeps = divergence in ("forward_kl", "cross_entropy")
    assert [bool(row.any()) for row in gradient] == [keeps or not lost for lost in infinite]
    wide = replace(rows, student=rows.student.double(), teachers=tuple(x.double() for x in rows.teachers))
    want = both_ways(reference, wide)[1].float()
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6)


def test_logits_at_the_end_of_the_range_are_masks_too() -> None:
    """Masks made with the lowest finite number, on both sides or on the teacher's alone, stay finite."""
    for dtype in STORAGE:
        rows = make(2, dtype=dtype, alpha=0.0, target=None)
        rows.student[:, 100:140], rows.teachers[0][:, 100:140] = torch.finfo(dtype).min, torch.finfo(dtype).min
        loss, gradient = both_ways(logit, rows)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        masked = replace(rows, student=rows.student.clone(), teachers=(rows.teachers[0].clone(),))
        masked.student[:, 100:140], masked.teachers[0][:, 100:140] = -INF, -INF
        torch.testing.assert_close(loss, both_ways(logit, masked)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-1, -101, LONG, 2**40])
def test_a_label_outside_the_vocabulary_is_nan_in_its_row(label: int) -> None:
    rows = make(label_smoothing=0.1)
    want = both_ways(logit, rows)
    rows.target[1] = label
    loss, gradient = both_ways(logit, rows)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    assert torch.equal(gradient[::2], want[1][::2])


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd"])
def test_a_temperature_that_is_not_positive_is_nan_in_its_row(divergence: str, temperature: float) -> None:
    for name in ("temperature", "teacher_temperature"):
        value: Any = columns(1.0, temperature, 2.0)
        rows = make(vocabulary=40, divergence=divergence)
        rows = replace(rows, **{name: value if name == "temperature" else (value,)})
        assert logit.forward(rows)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("divisor", [None, 4.0, 0.0, "tensor", "zero tensor"])
def test_divisors(divisor: Any) -> None:
    given = {"tensor": torch.tensor(3.0, device=DEVICE), "zero tensor": torch.zeros((), device=DEVICE)}
    rows = make(vocabulary=40, reduce=True, divisor=given.get(divisor, divisor), row_weight=columns(1, 0, 3))
    for got, want in zip(logit.forward(rows)[::2], reference.forward(rows)[::2], strict=True):
        torch.testing.assert_close(got, want)
    loss, gradient = both_ways(logit, rows)
    torch.testing.assert_close(gradient, both_ways(reference, rows)[1], rtol=1e-4, atol=1e-6)
    assert bool(loss == 0) == bool(not gradient.any()) == (divisor in (0.0, "zero tensor"))


def test_no_row_that_counts() -> None:
    rows = make(vocabulary=40, reduce=True)
    rows.target.fill_(-100)
    rows.student.fill_(NAN)
    loss, gradient = both_ways(logit, rows)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_no_row(divergence: str) -> None:
    rows = problem(torch.zeros(0, 5, device=DEVICE), torch.zeros(0, 5, device=DEVICE), divergence=divergence)
    for reduce in (False, True):
        loss, gradient = both_ways(logit, replace(rows, reduce=reduce))
        assert loss.tolist() == (0.0 if reduce else [])
        assert gradient.shape == (0, 5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
def test_digits_survive_far_from_zero(divergence: str) -> None:
    rows = make(2, teachers=2, divergence=divergence, label_smoothing=0.1, z_loss=0.0)
    rows.student.add_(3000.0)
    rows.teachers[0].sub_(5000.0)
    check(rows)


def test_inputs_are_left_alone() -> None:
    rows = make(divergence="jsd", row_weight=columns(1, 2, 3), alpha=columns(0, 0.5, 1))
    before = [x.clone() for x in (rows.student, *rows.teachers, rows.target, rows.row_weight, rows.alpha)]
    both_ways(logit, rows)
    for x, was in zip((rows.student, *rows.teachers, rows.target, rows.row_weight, rows.alpha), before, strict=True):
        assert torch.equal(x, was)


def test_two_passes_are_the_divergences_that_need_them() -> None:
    assert divergences.TWO_PASS == TWO_PASS
    assert set(divergences.TERMS) == set(_rows.DIVERGENCES)
