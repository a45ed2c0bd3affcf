r"""Distillation losses on rows of logits: the mathematics, in eager PyTorch.

With s, t a row of the student's and a teacher's logits, T and T_t their temperatures::

    q = softmax(s / T)    p = softmax(t / T_t)    H = cross-entropy of s at temperature 1
    L = weight * (alpha * H + (1 - alpha) * S)    S = T**2 * sum_k w_k D(p_k, q)

A divergence D is two functions of log p_j and log q_j: its value v_j, with D = sum_j v_j, and W_j = q_j * dD/dq_j.
The chain rule through the softmax gives every gradient the same shape::

    dD/ds_j = (W_j - q_j * omega) / T        omega = sum_j W_j

A multiple of q_j may be added to W_j: it cancels. The pieces below use that to make W_j vanish term by term at p = q.
A probability of 0 contributes 0, so the pieces decide by the logits (a logit of -inf), never by an underflowed exp.

Sources: Hinton et al. 2015 (forward KL, T**2); Agarwal et al. 2024 (generalised JSD); Ko et al. 2024 (skew KL).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks, _rows
from .._rows import LogitRows
from . import standard

Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # log p, log q, beta -> v, W

INF = float("inf")


def _absent(log_probability: Tensor) -> Tensor:
    return log_probability == -INF


def forward_kl(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = p (log p - log q); dv/dq = -p / q."""
    p = lp.exp()
    v = torch.where(_absent(lq), INF, p * (lp - lq))
    return torch.where(_absent(lp), 0.0, v), -p


def cross_entropy(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = -p log q; dv/dq = -p / q."""
    p = lp.exp()
    v = torch.where(_absent(lq), INF, -p * lq)
    return torch.where(_absent(lp), 0.0, v), -p


def reverse_kl(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = q (log q - log p); dv/dq = log q - log p + 1."""
    v = torch.where(_absent(lp), INF, lq.exp() * (lq - lp))
    v = torch.where(_absent(lq), 0.0, v)
    return v, v


def jsd(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = beta p log(p/m) + (1-beta) q log(q/m), m = beta p + (1-beta) q; dv/dq = (1-beta) log(q/m)."""
    lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    teacher_side = torch.where(_absent(lp), 0.0, beta * lp.exp() * (lp - lm))
    student_side = torch.where(_absent(lq), 0.0, (1 - beta) * lq.exp() * (lq - lm))
    return teacher_side + student_side, student_side


def skew_kl(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = p log(p/m), m = beta p + (1-beta) q; dv/dq = -(1-beta) p/m."""
    lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    v = torch.where(_absent(lp), 0.0, lp.exp() * (lp - lm))
    w = torch.where(_absent(lq), 0.0, (beta - 1) * lq.exp() * torch.expm1(lp - lm))
    return v, w


def skew_reverse_kl(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = q log(q/m), m = beta q + (1-beta) p; dv/dq = log(q/m) + 1 - beta q/m."""
    lm = torch.logaddexp(lq + math.log(beta), lp + math.log1p(-beta))
    q = lq.exp()
    v = torch.where(_absent(lq), 0.0, q * (lq - lm))
    w = torch.where(_absent(lq), 0.0, q * ((lq - lm) - beta * torch.expm1(lq - lm)))
    return v, w


def tvd(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v = |p - q| / 2; dv/dq = sign(q - p) / 2, the subgradient 0 at p = q."""
    p, q = lp.exp(), lq.exp()
    difference = q - p
    sign = torch.where(difference.isnan(), difference, torch.sign(difference))  # torch.sign(nan) is 0
    return difference.abs() / 2, q * sign / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "cross_entropy": cross_entropy,
}


def forward(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
    if rows.student.is_cpu:
        _checks.row_data(rows, rows.student.shape[1])
    dtype = _dtype(rows)
    n, teachers = rows.student.shape[0], len(rows.teachers)
    state = rows.student.new_zeros((n, _rows.state_width(teachers, rows.standardize)), dtype=dtype)
    state[:, _rows.WEIGHT] = _weight(rows, dtype)
    if rows.target is not None:
        _hard_term(rows, state)
    if teachers:
        _soft_term(rows, state)
    if rows.agreement:
        _agreement(rows, state)

    alpha = _column(rows.alpha, dtype).squeeze(-1)
    loss = state[:, _rows.WEIGHT] * (alpha * state[:, _rows.HARD] + (1 - alpha) * state[:, _rows.SOFT])
    divisor = state[:, _rows.WEIGHT].sum() if rows.divisor is None else rows.divisor
    divisor = torch.as_tensor(divisor, dtype=dtype, device=rows.student.device)
    scale = torch.where(divisor == 0, 0.0, 1 / divisor)
    if rows.reduce:
        loss = torch.where(divisor == 0, 0.0, loss.sum() * scale)
    return loss, state.double(), scale.double()


def backward(rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
    dtype = _dtype(rows)
    state = state.to(dtype)
    upstream = grad_loss.to(dtype) * (torch.as_tensor(scale, dtype=dtype, device=state.device) if rows.reduce else 1.0)
    weight = (upstream * state[:, _rows.WEIGHT]).unsqueeze(-1)
    alpha = _column(rows.alpha, dtype)
    grad = torch.zeros(rows.student.shape, dtype=dtype, device=rows.student.device)
    for k in range(len(rows.teachers)):
        grad[:, : rows.shared] += _soft_gradient(rows, state, k, weight * (1 - alpha))
    if rows.label_slope is not None:
        grad[:, : rows.shared] += _label_gradient(rows, state, rows.label_slope.to(dtype).unsqueeze(-1))
    if rows.target is not None:
        grad += _hard_gradient(rows, state, weight * alpha)
    return rows.student.copy_(grad) if rows.overwrite else grad.to(rows.student.dtype)


def _hard_term(rows: LogitRows, state: Tensor) -> None:
    """H = -(1-eps) log q_y - eps mean_j log q_j + z_loss logsumexp(s)^2."""
    assert rows.target is not None
    logits = rows.student.to(state.dtype)
    vocabulary = logits.shape[-1]
    highest, logsum = _log_normaliser(logits, 1.0)
    log_q = (logits - highest) - logsum
    known = (rows.target >= 0) & (rows.target < vocabulary)
    label = torch.where(known, rows.target, 0).unsqueeze(-1)
    smoothing = rows.label_smoothing
    hard = torch.zeros_like(logsum)
    if smoothing < 1:
        hard = hard - (1 - smoothing) * log_q.gather(-1, label)
    if smoothing > 0:
        hard = hard - smoothing * log_q.mean(-1, keepdim=True)
    hard = hard + rows.z_loss * (highest + logsum) ** 2
    # An id outside the vocabulary makes its own row NaN, backward included.
    logsum = torch.where(known.unsqueeze(-1), logsum, torch.nan)
    active = (state[:, _rows.WEIGHT] != 0).unsqueeze(-1) & (_column(rows.alpha, state.dtype) != 0)
    for column, value in (
        (_rows.HARD, torch.where(known.unsqueeze(-1), hard, torch.nan)),
        (_rows.HARD_MAX, highest),
        (_rows.HARD_LOGSUM, logsum),
    ):
        state[:, column] = torch.where(active, value, 0.0).squeeze(-1)


def _hard_gradient(rows: LogitRows, state: Tensor, coefficient: Tensor) -> Tensor:
    """(1 + 2 z_loss logsumexp) q_j - eps / V - (1-eps) [j = y]."""
    assert rows.target is not None
    logits = rows.student.to(state.dtype)
    highest, logsum = _state(state, _rows.HARD_MAX), _state(state, _rows.HARD_LOGSUM)
    q = ((logits - highest) - logsum).exp()
    grad = (1 + 2 * rows.z_loss * (highest + logsum)) * q - rows.label_smoothing / logits.shape[-1]
    label = rows.target.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    grad = grad.scatter_add(-1, label, torch.full_like(highest, rows.label_smoothing - 1))
    return torch.where(coefficient == 0, 0.0, coefficient * grad)


def _soft_term(rows: LogitRows, state: Tensor) -> None:
    dtype = state.dtype
    temperature = _temperature(rows.temperature, dtype)
    student = _compared(rows, rows.student, dtype)
    active = (state[:, _rows.WEIGHT] != 0).unsqueeze(-1) & (_column(rows.alpha, dtype) != 1)
    squared = temperature**2 if rows.scale_by_t2 else 1.0
    if rows.standardize:
        temperature = temperature * _measured(rows, state, 0, student, active)
    highest, logsum = _soft_normaliser(rows, student, temperature)
    soft = torch.zeros_like(highest)
    for k, logits in enumerate(rows.teachers):
        teacher, share = _compared(rows, logits, dtype), _share(rows, k, dtype)
        teacher_temperature = _temperature(rows.teacher_temperature[k], dtype)
        if rows.standardize:
            teacher_temperature = teacher_temperature * _measured(rows, state, 1 + k, teacher, active & (share != 0))
        teacher_highest, teacher_logsum = _soft_normaliser(rows, teacher, teacher_temperature)
        if rows.divergence == "mse":
            value, omega = _mse(student, teacher)
        else:
            lq = (student - highest) / temperature - logsum
            lp = (teacher - teacher_highest) / teacher_temperature - teacher_logsum
            v, w = DIVERGENCES[rows.divergence](lp, lq, rows.beta)
            value, omega = v.sum(-1, keepdim=True), w.sum(-1, keepdim=True)
        soft = soft + torch.where(share == 0, 0.0, share * squared * value)
        first = _rows.FIRST_TEACHER + _rows.TEACHER_COLUMNS * k
        columns = torch.cat([teacher_highest, teacher_logsum, omega], -1)
        looked_at = active & ((share != 0) | rows.without_target)
        state[:, first : first + _rows.TEACHER_COLUMNS] = torch.where(looked_at, columns, 0.0)
    columns = torch.cat([soft, highest, logsum], -1)
    state[:, _rows.SOFT : _rows.STUDENT_LOGSUM + 1] = torch.where(active, columns, 0.0)


def _soft_gradient(rows: LogitRows, state: Tensor, k: int, coefficient: Tensor) -> Tensor:
    dtype = state.dtype
    first = _rows.FIRST_TEACHER + _rows.TEACHER_COLUMNS * k
    teacher_highest, teacher_logsum, omega = (_state(state, first + i) for i in range(_rows.TEACHER_COLUMNS))
    coefficient = coefficient * _share(rows, k, dtype)
    temperature, teacher_temperature = (
        _temperature(value, dtype) for value in (rows.temperature, rows.teacher_temperature[k])
    )
    student, teacher = _compared(rows, rows.student, dtype), _compared(rows, rows.teachers[k], dtype)
    factor = temperature if rows.scale_by_t2 else 1 / temperature
    if rows.standardize:
        spread = standard.spread(_moments(rows, state, 0))
        temperature, factor = temperature * spread, factor / spread
        teacher_temperature = teacher_temperature * standard.spread(_moments(rows, state, 1 + k))
    if rows.divergence == "mse":
        grad = 2 * _difference(student, teacher) / omega
    else:
        highest, logsum = _state(state, _rows.STUDENT_MAX), _state(state, _rows.STUDENT_LOGSUM)
        lq = (student - highest) / temperature - logsum
        lp = (teacher - teacher_highest) / teacher_temperature - teacher_logsum
        _, w = DIVERGENCES[rows.divergence](lp, lq, rows.beta)
        grad = (w - lq.exp() * omega) * factor
    if rows.standardize:
        grad = standard.through(grad, student, _moments(rows, state, 0))
    return torch.where((coefficient == 0) | (omega == INF), 0.0, coefficient * grad)


def _measured(rows: LogitRows, state: Tensor, side: int, logits: Tensor, looked_at: Tensor) -> Tensor:
    """Puts the moments of a side into the state, and returns what its logits are divided by."""
    moments = torch.where(looked_at, standard.moments(logits), 0.0)
    _moments(rows, state, side).copy_(moments)
    return standard.spread(moments)


def _moments(rows: LogitRows, state: Tensor, side: int) -> Tensor:
    first = _rows.first_moment(len(rows.teachers)) + _rows.MOMENTS * side
    return state[:, first : first + _rows.MOMENTS]


def _label_gradient(rows: LogitRows, state: Tensor, slope: Tensor) -> Tensor:
    """slope ([j = y] - q_j), with q over the others."""
    student = _compared(rows, rows.student, state.dtype)
    highest, logsum = _state(state, _rows.STUDENT_MAX), _state(state, _rows.STUDENT_LOGSUM)
    q = ((student - highest) / _temperature(rows.temperature, state.dtype) - logsum).exp()
    return torch.where(slope == 0, 0.0, slope * (_is_target(rows, student).to(state.dtype) - q))


def _compared(rows: LogitRows, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """What the soft term sees."""
    logits = logits[:, : rows.shared].to(dtype)
    if rows.standardize:
        logits = standard.bounded(logits)
    return logits.masked_fill(_is_target(rows, logits), -INF) if rows.without_target else logits


def _is_target(rows: LogitRows, logits: Tensor) -> Tensor:
    assert rows.target is not None
    return torch.arange(logits.shape[-1], device=logits.device) == rows.target.unsqueeze(-1)


def _soft_normaliser(rows: LogitRows, logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    highest, logsum = _log_normaliser(logits, temperature)
    if rows.without_target:
        logsum = torch.where(_absent(logits).all(-1, keepdim=True), -INF, logsum)
    return highest, logsum


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.where(_absent(student) & _absent(teacher), 0.0, student - teacher)


def _mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """mean (s - t)^2 over the ids that are not at -inf on both sides, and their count."""
    count = (~(_absent(student) & _absent(teacher))).sum(-1, keepdim=True).to(student.dtype)
    value = _difference(student, teacher).square().sum(-1, keepdim=True) / count
    for side in (student, teacher):
        unusable = (side == INF).any(-1, keepdim=True) | ~side.isfinite().any(-1, keepdim=True)
        value = torch.where(unusable, torch.nan, value)
    return value, torch.where(value.isfinite(), count, value)


def _agreement(rows: LogitRows, state: Tensor) -> None:
    counts = state[:, _rows.WEIGHT] != 0
    best = rows.student.argmax(-1)
    if rows.target is not None:
        state[:, _rows.TARGET_AGREES] = ((best == rows.target) & counts).to(state.dtype)
    for k, teacher in enumerate(rows.teachers):
        agrees = (best == teacher[:, : rows.shared].argmax(-1)) & counts
        share = _share(rows, k, state.dtype).expand(len(best), 1).squeeze(-1)
        state[:, _rows.TEACHER_AGREES] += torch.where(agrees, share, 0.0)


def _log_normaliser(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """max and log sum exp((x - max) / T); NaN where a row has no finite logit, a +inf or a NaN."""
    highest = logits.amax(-1, keepdim=True)
    return highest, ((logits - highest) / temperature).exp().sum(-1, keepdim=True).log()


def _weight(rows: LogitRows, dtype: torch.dtype) -> Tensor:
    if rows.row_weight is None:
        weight = rows.student.new_ones(rows.student.shape[0], dtype=dtype)
    else:
        weight = rows.row_weight.to(dtype)
    return weight if rows.target is None else torch.where(rows.target == rows.ignore_index, 0.0, weight)


def _dtype(rows: LogitRows) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for x in (rows.student, *rows.teachers))
    return torch.float64 if wide else torch.float32


def _column(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A number, or one a row, as something that broadcasts over (N, V)."""
    if isinstance(value, Tensor):
        return value.to(dtype).unsqueeze(-1)
    return torch.tensor(value, dtype=dtype, device="cpu")  # 0-dim: it fits every device, and no default device


def _temperature(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """NaN where a temperature is not positive, so that its row is NaN."""
    temperature = _column(value, dtype)
    return torch.where(temperature > 0, temperature, torch.nan)


def _share(rows: LogitRows, k: int, dtype: torch.dtype) -> Tensor:
    weight = rows.teacher_weight
    return _column(weight[:, k] if isinstance(weight, Tensor) else weight[k], dtype)


def _state(state: Tensor, column: int) -> Tensor:
    return state[:, column].unsqueeze(-1)
