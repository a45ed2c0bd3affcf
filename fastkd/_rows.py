"""What every implementation of a logit loss is asked, and what it hands back: rows of logits, and numbers.

``losses/logit.py`` checks a user's arguments and turns them into one :class:`LogitRows`. Each implementation has two
functions with the same signature, so that choosing one is a module lookup::

    forward(rows)                            -> loss, state, scale
    backward(rows, state, scale, grad_loss)  -> grad

``loss`` is ``(N,)`` when ``rows.reduce`` is false and 0-dim otherwise: ``sum_i L_i * scale``, summed in a fixed order,
where ``scale`` (a float, or a 0-dim float64 tensor) is 1 / divisor, and 0 where the divisor is 0. ``grad`` has the
student's shape and dtype; it is the student itself when ``rows.overwrite`` is true. ``state`` is a float64 tensor
``(N, state_width(teachers))``, the same in every implementation (one's forward may feed another's backward), with the
columns below. It holds a few numbers a row, and everything in the row hangs on them. Maxima are kept apart from the
logarithms of sums: added, they would lose the digits of distant logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

WEIGHT = 0  # row_weight, or 0 for a row that is dropped (target == ignore_index)
HARD = 1  # H; 0 where its weight (alpha) is 0
SOFT = 2  # S, T**2 included; 0 where its weight (1 - alpha) is 0
STUDENT_MAX = 3  # max of the student's logits over the shared ids
STUDENT_LOGSUM = 4  # log sum exp((student - max) / T) over the shared ids
HARD_MAX = 5  # max of the student's logits over all its ids
HARD_LOGSUM = 6  # log sum exp(student - max) over all its ids
TARGET_AGREES = 7  # 1 where the student's best id is the target, if rows.agreement
TEACHER_AGREES = 8  # the teacher_weight of the teachers whose best id is the student's, if rows.agreement
FIRST_TEACHER = 9  # then TEACHER_COLUMNS for each teacher:
TEACHER_COLUMNS = 3  # max, log sum exp((teacher - max) / T_teacher), omega
MOMENTS = 3  # of standardised logits, after all teachers, for the student and each teacher: max - mean, std, count

# omega is the one more number that a teacher's gradient needs: with h_j = dD/dq_j up to a constant,
#   dD/dstudent_j = q_j * (h_j - omega) / T,    omega = sum_j q_j h_j / sum_j q_j;
# mse stores the count of ids it averaged over. +inf says that the gradient of this teacher's term is 0 in this row.


def state_width(teachers: int, standardize: bool = False) -> int:
    return first_moment(teachers) + (MOMENTS * (1 + teachers) if standardize else 0)


def first_moment(teachers: int) -> int:
    return FIRST_TEACHER + TEACHER_COLUMNS * teachers


@dataclass(slots=True)
class SparseTeacher:
    """A teacher known by k ids a row; its rows go with those of the student."""

    indices: Tensor  # (N, k) int64, contiguous; -1: absent
    log_probs: Tensor  # (N, k) at the teacher's temperature, float32 or float64; -inf: absent
    tail: str  # "bucket"; "whole": no other id has any; "support": the student's other ids do not count;
    #            "events": log_probs is (N, k + 1), the last that of all other ids together
    weight: float | Tensor  # its teacher_weight
    notes: Any = field(default=None, init=False)  # a term's own, from its forward to its backward


@dataclass(slots=True)
class ExpectedTeacher:
    """A teacher known by softmax(teacher) @ weight, under a student's head that is frozen: of its logits nothing else
    enters the gradient."""

    mean: Tensor  # (N, H)
    bias: Tensor | None  # (N,): scale * softmax(teacher) @ bias
    entropy: Tensor | None  # (N,)
    weight: float | Tensor  # its teacher_weight
    checksum: float | None  # of the head's weights, if it is known


@dataclass(slots=True)
class LogitRows:
    """A checked problem: N rows, K teachers. Numbers that may vary by row are a float, or a tensor ``(N,)``."""

    student: Tensor  # (N, V) float16/32/64 or bfloat16, last stride 1, any row stride
    teachers: tuple[Tensor, ...]  # each (N, at least `shared`), last stride 1; dtypes may differ from the student's
    target: Tensor | None  # (N,) int64, stride 1
    row_weight: Tensor | None  # (N,) float32 (float64 if the computation is)
    alpha: float | Tensor  # weight of the hard term; 0.0 without a target, 1.0 without a teacher
    temperature: float | Tensor  # both temperatures are 1.0 for mse
    teacher_temperature: tuple[float | Tensor, ...]
    teacher_weight: tuple[float, ...] | Tensor  # K floats, or (N, K)
    divisor: float | Tensor | None  # None: the sum of the weights of the rows that count
    divergence: str  # a name of DIVERGENCES; skew_* never with beta 0 (those are forward_kl and reverse_kl)
    beta: float
    scale_by_t2: bool
    label_smoothing: float
    z_loss: float
    ignore_index: int
    shared: int  # the soft term compares the ids below this; the hard term sees all V
    reduce: bool
    agreement: bool  # fill the two columns of agreement
    overwrite: bool  # backward writes the gradient over the student
    # For losses/terms/, which ask the implementations for what these need:
    sparse: tuple[SparseTeacher, ...] = ()
    expected: tuple[ExpectedTeacher, ...] = ()
    hidden: Tensor | None = None  # (N, H): what the student's logits were computed from, times their scale
    op: str = "kd_loss"  # whose rows these are, for messages
    standardize: bool = False  # see below
    label_weight: float = 0.0  # of what losses/terms/decoupled.py says of the target
    without_target: bool = False  # see below
    label_slope: Tensor | None = None  # (N,), for backward
    notes: Any = field(default=None, init=False)  # an implementation's own, from its forward to its backward


# standardize: in the soft term each side is z = (s - mean) / (SPREAD + std) over its shared ids above MASK, which for a
# softmax is a temperature of the row's own; T**2 is that of the caller. Not mse. In a row where the student is constant
# its gradient is 0.
SPREAD, MASK = 1e-7, -1e30

# without_target: the soft term is over the shared ids but the row's target, as if both sides were at -inf there; with
# one teacher, forward_kl or cross_entropy, and no label smoothing. The hard term sees all ids as ever. A teacher of
# weight 0 is looked at all the same, and a side without a finite logit among the others has the log-sum -inf.
# Backward adds label_slope to the target's logit, and takes it from the others in proportion to q: the derivative of
# what depends on the student's odds of the target alone. Every weight and the incoming gradient are in it.


def of_rows(
    rows: LogitRows, take: Callable[[Tensor], Tensor], student: Tensor, teachers: tuple[Tensor, ...]
) -> LogitRows:
    """The problem of some rows: ``take`` picks their numbers, the logits are given."""

    def pick(value: Any) -> Any:
        return take(value) if isinstance(value, Tensor) else value

    return replace(
        rows,
        student=student,
        teachers=teachers,
        target=pick(rows.target),
        row_weight=pick(rows.row_weight),
        alpha=pick(rows.alpha),
        temperature=pick(rows.temperature),
        teacher_temperature=tuple(pick(value) for value in rows.teacher_temperature),
        teacher_weight=pick(rows.teacher_weight),
        sparse=tuple(
            SparseTeacher(take(one.indices), take(one.log_probs), one.tail, pick(one.weight)) for one in rows.sparse
        ),
        expected=tuple(
            ExpectedTeacher(take(one.mean), pick(one.bias), pick(one.entropy), pick(one.weight), one.checksum)
            for one in rows.expected
        ),
    )


def weights(rows: LogitRows, count: int, like: Tensor) -> Tensor:
    """(N,) float64: what each row counts."""
    weight = like.new_ones(count, dtype=torch.float64) if rows.row_weight is None else rows.row_weight.double()
    return weight if rows.target is None else torch.where(rows.target == rows.ignore_index, 0.0, weight)


DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "cross_entropy",
    "mse",
)
