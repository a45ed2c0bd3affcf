"""Distillation losses on rows of logits: ``forward`` and ``backward``, which plan and launch the kernels.

``rows`` is a problem as the caller's contract has it, and is read by attribute. A row is one program, or several where
there are few rows: each part then leaves its partial numbers, and a small launch of one program a row merges them in a
fixed order. Nothing is added atomically, so equal inputs give equal bits. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergence_values import divergence_sums, merge_divergence
from .divergences import TERMS, TWO_PASS
from .row_gradients import row_gradient
from .row_values import merge_statistics, statistics
from .rows import (
    FIRST_TEACHER,
    INTERPRETED,
    MAX_PARTS,
    STUDENT_MAX,
    STUDENT_PARTIALS,
    TEACHER_COLUMNS,
    TEACHER_PARTIALS,
    WEIGHT,
)
from .standard_moments import along_sums, moments

MOMENTS = 3  # of a side of standardised logits: max - mean, std, count
SPREAD = 1e-7  # added to std
SLOPES = {"forward_kl": "forward_kl", "cross_entropy": "forward_kl", "mse": "mse"}  # the others: q (h - omega)
DIVERGENCE_PARTIALS = 3  # of a teacher in a part: the sums of v, q h and q


class Grid(NamedTuple):
    """How a row is walked over: tiles of R x K, U of them a step, in parts of ``chunk`` positions."""

    R: int
    K: int
    U: int
    warps: int
    parts: int
    chunk: int


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(rows: Any, *matrices: Tensor) -> Grid:
    n, vocabulary = rows.student.shape
    widest = max(x.element_size() for x in matrices)
    K = 16 // widest
    first = matrices[0]
    # Vector loads pair the ids of two rows only if both rows begin equally far from a 16-byte boundary.
    if not all(_misalignment(x, K) == _misalignment(first, K) for x in matrices):
        K = 1
    warps = 1 if vocabulary <= 1024 else 4 if vocabulary <= 8192 else 8
    R, U = 32 * warps, {8: 2, 4: 4, 1: 16}[K]
    if INTERPRETED.value:
        R = 4  # so that the short rows that an interpreter can afford still have unmasked steps
    step = R * K * U
    parts = _parts(n, vocabulary, step, first.device)
    chunk = -(-(vocabulary + K) // (parts * step)) * step
    return Grid(R, K, U, warps, -(-(vocabulary + K) // chunk), chunk)


def _misalignment(x: Tensor, K: int) -> tuple[int, int]:
    """Of the first row and, if there are more, from one row to the next, in elements."""
    return x.data_ptr() // x.element_size() % K, x.stride(0) % K if x.shape[0] > 1 else 0


def _parts(n: int, vocabulary: int, step: int, device: torch.device) -> int:
    """Enough programs to fill the device some six times, each with at least two unmasked steps."""
    if device.type != "cuda":
        return 1
    return max(1, min(-(-32 * _processors(device) // max(n, 1)), vocabulary // (2 * step), MAX_PARTS))


def _per_row(value: Any) -> Tensor | None:
    """One number a row, if there is one."""
    return _aligned(value) if isinstance(value, Tensor) else None


def _aligned(numbers: Tensor) -> Tensor:
    """As the kernels take them. Copied where its alignment would make a kernel of its own."""
    numbers = numbers.to(torch.float32).contiguous()
    return numbers.clone() if numbers.data_ptr() % 16 else numbers


def _float(value: Any) -> float:
    return 0.0 if isinstance(value, Tensor) else float(value)


def _teacher_temperatures(rows: Any) -> tuple[tuple[Tensor, ...] | None, tuple[float, ...]]:
    """All per row if one is."""
    given = rows.teacher_temperature[: len(rows.teachers)]
    numbers = tuple(_float(t) for t in given)
    if not any(isinstance(t, Tensor) for t in given):
        return None, numbers
    one_each = rows.student.new_empty(rows.student.shape[0], dtype=torch.float32)
    return tuple(_aligned(t if isinstance(t, Tensor) else torch.full_like(one_each, t)) for t in given), numbers


def _arguments(rows: Any) -> dict[str, Any]:
    """What all kernels take."""
    teachers, shares = rows.teachers, rows.teacher_weight
    temperature = rows.temperature if teachers else 1.0
    teacher_temperature_rows, teacher_temperatures = _teacher_temperatures(rows)
    return {
        "student": rows.student,
        "student_stride": rows.student.stride(0),
        "teacher": teachers[0] if teachers else None,
        "teacher_stride": teachers[0].stride(0) if teachers else 0,
        "others": tuple(teachers[1:]),
        "other_strides": tuple(t.stride(0) for t in teachers[1:]),
        "target": None if rows.target is None else rows.target.contiguous(),
        "alpha_rows": _per_row(rows.alpha),
        "alpha": _float(rows.alpha),
        "temperature_rows": _per_row(temperature),
        "temperature": _float(temperature),
        "teacher_temperature_rows": teacher_temperature_rows,
        "teacher_temperatures": teacher_temperatures,
        "share_rows": _per_row(shares) if teachers else None,
        "shares": tuple(0.0 if isinstance(shares, Tensor) else float(shares[k]) for k in range(len(teachers))),
        "V": rows.student.shape[1],
        "shared": rows.shared if teachers else 0,
        "smoothing": float(rows.label_smoothing),
        "z_loss": float(rows.z_loss),
        "SQUARED": bool(rows.scale_by_t2),
        "stretch_rows": None,
        "along_rows": None,
        "lift_rows": None,
        "HARD": _has_hard_term(rows),
        "WITHOUT": bool(rows.without_target),
    }


def _has_hard_term(rows: Any) -> bool:
    return rows.target is not None and (isinstance(rows.alpha, Tensor) or rows.alpha != 0)


def _same_softmax(rows: Any) -> bool:
    one = not isinstance(rows.temperature, Tensor) and rows.temperature == 1
    whole = rows.shared == rows.student.shape[1] and not (rows.without_target or rows.standardize)
    return bool(rows.teachers) and _has_hard_term(rows) and one and whole


def _launch(kernel: Any, grid: tuple[int, ...], plan: Grid | None, arguments: dict[str, Any]) -> None:
    """Passes on the arguments that the kernel has."""
    if plan is not None:
        arguments = arguments | {"R": plan.R, "K": plan.K, "U": plan.U, "chunk": plan.chunk}
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    # Products are fused into sums, whatever a version of Triton does by default: it saves a fifth of the instructions.
    kernel[grid](**taken, num_warps=1 if plan is None else plan.warps, num_stages=1, enable_fp_fusion=True)


@contextlib.contextmanager
def _running_on(x: Tensor) -> Iterator[None]:
    """Makes x's device the one to launch on. The interpreter is numpy, and warns of what a device does not."""
    if x.is_cuda:
        with torch.cuda.device_of(x):
            yield
    else:
        import numpy as np

        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield


@torch.no_grad()
def forward(rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, state and scale of a ``LogitRows``; the contract is written where that class is."""
    n, teachers = rows.student.shape[0], len(rows.teachers)
    state = rows.student.new_empty((n, _first_moment(teachers)), dtype=torch.float64)
    loss = rows.student.new_empty(n, dtype=torch.float32)
    own = rows.student.new_zeros((n, MOMENTS * (1 + teachers)), dtype=torch.float64) if rows.standardize else None
    if n:
        with _running_on(rows.student):
            if own is not None:
                _measure(rows, own)
            _row_losses(rows, {} if own is None else _stretched(rows, own), state, loss)
    if own is not None:
        state = torch.cat([state, _lifted(rows, state, own)], 1)
    scale, nothing = _scale(rows, state)
    if rows.reduce:
        loss = torch.where(nothing, 0.0, loss.sum() * scale).to(torch.float32)
    return loss, state, scale


def _first_moment(teachers: int) -> int:
    return int(FIRST_TEACHER.value + TEACHER_COLUMNS.value * teachers)


def _row_losses(rows: Any, numbers: dict[str, Any], state: Tensor, loss: Tensor) -> None:
    n, teachers = rows.student.shape[0], len(rows.teachers)
    plan = _plan(rows, rows.student, *rows.teachers)
    hard, two_pass = _has_hard_term(rows), bool(teachers) and rows.divergence in TWO_PASS
    beyond = (not teachers or rows.shared < rows.student.shape[1]) and (hard or rows.agreement)
    arguments = (
        _arguments(rows)
        | numbers
        | {
            "row_weight": None if rows.row_weight is None else rows.row_weight.contiguous(),
            "state": state,
            "loss": loss,
            "ignore_index": rows.ignore_index,
            "parts": plan.parts,
            "KIND": "two_pass" if two_pass else rows.divergence if teachers else "forward_kl",
            "SAME": _same_softmax(rows),
            "BEYOND": beyond,
            "SMOOTH": hard and rows.label_smoothing != 0,
            "AGREE": bool(rows.agreement),
            "MAX": MAX_PARTS,
        }
    )
    width = STUDENT_PARTIALS.value + TEACHER_PARTIALS.value * teachers
    arguments["partials"] = loss.new_empty((n, plan.parts, width)) if plan.parts > 1 else None
    _launch(statistics, (n, plan.parts), plan, arguments)
    if plan.parts > 1:
        _launch(merge_statistics, (n,), None, arguments | {"K": plan.K})
    if two_pass:
        arguments |= {"beta": float(rows.beta), "rest": 1 - float(rows.beta), "TERM": TERMS[rows.divergence]}
        if plan.parts > 1:
            arguments["partials"] = state.new_empty((n, plan.parts, DIVERGENCE_PARTIALS * teachers))
        _launch(divergence_sums, (n, plan.parts), plan, arguments)
        if plan.parts > 1:
            _launch(merge_divergence, (n,), None, arguments | {"TEACHERS": teachers})


def _scale(rows: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    """1 / divisor, or 0 where there is nothing to divide by; and whether that is so. Nothing leaves the device."""
    divisor = state[:, WEIGHT.value].sum() if rows.divisor is None else rows.divisor
    if not isinstance(divisor, Tensor):
        divisor = state.new_full((), float(divisor))
    divisor = divisor.to(state.dtype)
    nothing = divisor == 0
    return torch.where(nothing, 0.0, 1 / divisor), nothing


@torch.no_grad()
def backward(rows: Any, state: Tensor, scale: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient of the student's logits, from the state that any implementation's forward left."""
    n, vocabulary = rows.student.shape
    gradient = rows.student if rows.overwrite else _like(rows.student)
    if not n:
        return gradient
    plan = _plan(rows, rows.student, gradient, *rows.teachers)
    first = _first_moment(len(rows.teachers))
    state, own = state[:, :first], state[:, first:]
    arguments = _arguments(rows) | {
        "gradient": gradient,
        "gradient_stride": gradient.stride(0),
        "state": state.contiguous(),
        "upstream": grad_loss,
        "upstream_stride": 0 if rows.reduce else grad_loss.stride(0),
        "scale": scale if rows.reduce else None,
        "label_slope": _per_row(rows.label_slope),
        "beta": float(rows.beta),
        "rest": 1 - float(rows.beta),
        "KIND": SLOPES.get(rows.divergence, "h") if rows.teachers else "forward_kl",
        "TERM": TERMS[rows.divergence if rows.teachers else "forward_kl"],
        "SAME": _same_softmax(rows),
        "BEYOND": not rows.teachers or rows.shared < vocabulary,
    }
    with _running_on(rows.student):
        if rows.standardize:
            arguments |= _stretched(rows, own, slopes=True)
            arguments |= _along(arguments, own, plan)
        _launch(row_gradient, (n, plan.parts), plan, arguments)
    return gradient


def _measure(rows: Any, own: Tensor) -> None:
    """Fills in mean, std and count of each side's logits."""
    n = len(own)
    for side, logits in enumerate((rows.student, *rows.teachers)):
        plan = _plan(rows, logits)
        partials = own.new_empty((n, plan.parts, MOMENTS))
        arguments = {
            "student": logits,
            "student_stride": logits.stride(0),
            "target": None if rows.target is None else rows.target.contiguous(),
            "row_weight": None if rows.row_weight is None else rows.row_weight.contiguous(),
            "partials": partials,
            "shared": rows.shared,
            "parts": plan.parts,
            "ignore_index": rows.ignore_index,
        }
        _launch(moments, (n, plan.parts), plan, arguments)
        counts, means, squares = partials.unbind(-1)
        count = counts.sum(1)
        mean = (counts * means).sum(1) / count.clamp(min=1)
        squares = squares + counts * (means - mean.unsqueeze(1)) ** 2
        std = torch.where(count > 1, (squares.sum(1) / (count - 1)).sqrt(), 0.0)
        own[:, MOMENTS * side : MOMENTS * (side + 1)] = torch.stack([mean, std, count], 1)


def _lifted(rows: Any, state: Tensor, own: Tensor) -> Tensor:
    """The moments as the state has them: how far the maximum is above the mean, and 0 for what is not looked at."""
    active = (state[:, WEIGHT.value] != 0) & (rows.alpha != 1)
    given = rows.teacher_weight
    shares = given.unbind(1) if isinstance(given, Tensor) else given
    looked_at = torch.stack([active, *(active & (share != 0) for share in shares)], 1)
    columns = (
        state[:, STUDENT_MAX.value : STUDENT_MAX.value + 1],
        state[:, FIRST_TEACHER.value :: TEACHER_COLUMNS.value],
    )
    lifted = own.unflatten(1, (-1, MOMENTS)).clone()
    lifted[..., 0] = torch.cat(columns, 1) - lifted[..., 0]
    return torch.where(looked_at.unsqueeze(-1), lifted, 0.0).flatten(1)


def _stretched(rows: Any, own: Tensor, slopes: bool = False) -> dict[str, Any]:
    """What standardised logits are divided by, beside a temperature. ``slopes``: a constant row has none."""
    stds = own[:, 1::MOMENTS]
    spread = SPREAD + stds.nan_to_num(nan=1.0, posinf=1e30)  # a NaN makes its row NaN by itself
    stretch = torch.where(stds[:, 0] == 0, torch.inf, spread[:, 0]) if slopes else spread[:, 0]
    given = rows.teacher_temperature[: len(rows.teachers)]
    temperatures = tuple(_aligned(t * spread[:, 1 + k]) for k, t in enumerate(given))
    return {"stretch_rows": _aligned(stretch), "teacher_temperature_rows": temperatures}


def _along(arguments: dict[str, Any], own: Tensor, plan: Grid) -> dict[str, Any]:
    """The part of the gradient along the logits, which changes their spread alone: what is taken of each s - mean."""
    lift, std, count = own[:, :MOMENTS].unbind(1)
    lift = _aligned(lift)
    partials = own.new_empty((len(own), plan.parts))
    more = {"lift_rows": lift, "partials": partials, "parts": plan.parts}
    _launch(along_sums, (len(own), plan.parts), plan, arguments | more)
    along = -partials.sum(1) / ((count - 1) * std * arguments["stretch_rows"])
    return {"lift_rows": lift, "along_rows": _aligned(torch.where(std == 0, 0.0, along))}


def _like(student: Tensor) -> Tensor:
    """An empty gradient whose rows are as far from a 16-byte boundary as the student's, so that both are read wide."""
    n, vocabulary = student.shape
    begin, step = _misalignment(student, 16 // student.element_size())
    stride = vocabulary + (step - vocabulary) % (16 // student.element_size()) if n > 1 else vocabulary
    if begin == 0 and stride == vocabulary:
        return torch.empty_like(student, memory_format=torch.contiguous_format)
    return student.new_empty(begin + n * stride).as_strided((n, vocabulary), (stride, 1), begin)
