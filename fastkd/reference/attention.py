r"""Divergence of two attention distributions: the mathematics, in eager PyTorch.

With q, k a student's queries and keys, of a row i its scores and their softmax over the keys j that it sees::

    a_ij = scale * q_i k_j    p^s_i = softmax(a_i)    L_i = KL(p^t_i | p^s_i) = sum_j p^t_ij (log p^t_ij - log p^s_ij)

The gradient of the scores is that of forward KL, and queries and keys get theirs by the products that made the scores::

    A_ij = w_i scale (p^s_ij - p^t_ij)    dL/dq_i = sum_j A_ij k_j    dL/dk_j = sum_i A_ij q_i

with w_i what multiplies L_i in the result. Where several heads of queries share a head of keys, its gradient is the sum
of theirs. All scores are in memory here; the other implementations have a tile of them at a time.

Sources: Wang et al. 2020, arXiv 2002.10957 and 2012.15828 (relations of queries, keys and values); Jiao et al. 2020,
arXiv 1909.10351 (attention as what is distilled).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention import (
    COUNTS,
    STATE_WIDTH,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    TEACHER_LOGSUM,
    TEACHER_MAX,
    AttentionRows,
)
from .._autocast import without_autocast

INF = float("inf")


def forward(rows: AttentionRows) -> tuple[Tensor, Tensor, Tensor]:
    seen, counts = _seen(rows)
    state = torch.zeros((*rows.student_queries.shape[:3], STATE_WIDTH), dtype=_dtype(rows), device=seen.device)
    loss = torch.zeros(state.shape[:3], dtype=state.dtype, device=seen.device)
    if loss.numel() and seen.shape[-1]:
        student, student_max, student_logsum = _log_softmax(_student(rows), rows.scale, seen)
        teacher, teacher_max, teacher_logsum = _log_softmax(_teacher(rows), rows.teacher_scale, seen)
        value = torch.where(seen, teacher.exp() * (teacher - student), 0.0).sum(-1)
        columns = torch.stack([torch.ones_like(value), student_max, student_logsum, teacher_max, teacher_logsum], -1)
        state = torch.where(counts.unsqueeze(-1), columns, 0.0)
        loss = torch.where(counts, value, 0.0)
    divisor = state[..., COUNTS].sum() if rows.divisor is None else loss.new_tensor(rows.divisor)
    scale = torch.where(divisor == 0, 0.0, 1 / divisor)
    return (loss.sum() * scale if rows.reduce else loss), state.double(), scale.double()


def backward(
    rows: AttentionRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    seen, counts = _seen(rows)
    dtype = _dtype(rows)
    upstream = grad_loss.to(dtype) * (torch.as_tensor(scale, dtype=dtype, device=seen.device) if rows.reduce else 1.0)
    weight = torch.where(counts, upstream * rows.scale, 0.0)
    side = queries, keys, _ = _student(rows)
    state = state.to(dtype)
    student = _probabilities(side, rows.scale, state[..., STUDENT_MAX], state[..., STUDENT_LOGSUM])
    teacher = _probabilities(_teacher(rows), rows.teacher_scale, state[..., TEACHER_MAX], state[..., TEACHER_LOGSUM])
    slopes = torch.where(seen & counts.unsqueeze(-1), weight.unsqueeze(-1) * (student - teacher), 0.0)

    storage = rows.student_queries.dtype
    if rows.same:
        return (_product(slopes, keys) + _product(slopes.mT, queries)).to(storage), None
    of_queries = _product(slopes, keys).to(storage) if wanted[0] else None
    if not wanted[1]:
        return of_queries, None
    groups = rows.student_keys.shape[1]
    of_keys = _product(slopes.mT, queries).unflatten(1, (groups, queries.shape[1] // groups))
    return of_queries, of_keys.sum(2).to(storage)


def _seen(rows: AttentionRows) -> tuple[Tensor, Tensor]:
    """Which row sees which key, and which rows count; both broadcast over heads."""
    (length, keys), device = (rows.student_queries.shape[2], rows.student_keys.shape[2]), rows.student_queries.device
    seen = torch.ones((1, 1, length, keys), dtype=torch.bool, device=device)
    if rows.causal:
        seen = seen.tril()
    if rows.key_mask is not None:
        seen = seen & rows.key_mask[:, None, None, :]
    counts = seen.any(-1)
    return seen, counts if rows.query_mask is None else counts & rows.query_mask[:, None, :]


Side = tuple[Tensor, Tensor, Tensor]  # queries, keys, and NaN for the scores that a faulty token is part of, else 0


def _student(rows: AttentionRows) -> Side:
    return _usable(rows, rows.student_queries, rows.student_keys)


def _teacher(rows: AttentionRows) -> Side:
    return _usable(rows, rows.teacher_queries, rows.teacher_keys)


def _usable(rows: AttentionRows, queries: Tensor, keys: Tensor) -> Side:
    """In the dtype of the computation, keys once for every head, and zeros for a token that is none or faulty."""
    queries, query_fault = _clean(queries.to(_dtype(rows)), rows.query_mask)
    keys, key_fault = _clean(keys.to(_dtype(rows)), rows.key_mask)
    sharing = queries.shape[1] // keys.shape[1]
    fault = query_fault + key_fault.repeat_interleave(sharing, 1).mT
    return queries, keys.repeat_interleave(sharing, 1), fault


def _clean(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of zeros where they hold a NaN or an infinity, which makes their fault NaN."""
    if mask is not None:
        tokens = torch.where(mask[:, None, :, None], tokens, 0.0)
    fault = (tokens - tokens).sum(-1, keepdim=True)
    return torch.where(fault == 0, tokens, 0.0), fault


def _product(left: Tensor, right: Tensor) -> Tensor:
    with without_autocast(left.device):  # in the dtype of the operands
        return left @ right


def _dtype(rows: AttentionRows) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in rows.tensors) else torch.float32


def _log_softmax(side: Side, scale: float, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the keys that a row sees, with the two numbers that make it again."""
    queries, keys, fault = side
    scores = torch.where(seen, _product(queries, keys.mT) + fault, -INF)
    highest = scores.amax(-1, keepdim=True)
    below = (scores - highest) * scale
    logsum = below.exp().sum(-1, keepdim=True).log()
    return below - logsum, highest.squeeze(-1), logsum.squeeze(-1)


def _probabilities(side: Side, scale: float, highest: Tensor, logsum: Tensor) -> Tensor:
    queries, keys, fault = side
    scores = _product(queries, keys.mT) + fault
    return ((scores - highest.unsqueeze(-1)) * scale - logsum.unsqueeze(-1)).exp()
