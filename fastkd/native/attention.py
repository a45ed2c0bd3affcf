"""Addresses and numbers of a loss on attention scores, for the C++ kernels (csrc/cpu/attention_rows.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention import STATE_WIDTH, AttentionRows
from . import extension

_C = extension()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NONE, SUM, MEAN = 0, 1, 2  # AttentionReduction in csrc/cpu/attention_rows.h
CPU = torch.device("cpu")
NOTHING = (0, 0, 0, 0, 0, 0, 0)  # a gradient that nobody wants


def forward(rows: AttentionRows) -> tuple[Tensor, Tensor, float]:
    sizes = rows.student_queries.shape[:3]
    state = torch.empty((*sizes, STATE_WIDTH), dtype=torch.float64, device=CPU)
    loss = torch.empty(() if rows.reduce else sizes, dtype=torch.float32, device=CPU)
    reduction = NONE if not rows.reduce else MEAN if rows.divisor is None else SUM
    scale = _C.attention_forward(_numbers(rows), reduction, rows.divisor or 0.0, loss.data_ptr(), state.data_ptr())
    return loss, state, scale


def backward(
    rows: AttentionRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    queries, keys = rows.student_queries, rows.student_keys
    of_queries = of_keys = None
    if rows.same:
        # What queries and keys get is added up before it is rounded.
        of_queries, of_keys = _zeros(queries, torch.float32), _zeros(keys, keys.dtype)
    else:
        of_queries = _zeros(queries, queries.dtype) if wanted[0] else None
        of_keys = _zeros(keys, keys.dtype) if wanted[1] else None
    state, upstream = state.contiguous(), grad_loss.float().contiguous()  # named, so that they live as long as the call
    _C.attention_backward(
        _numbers(rows),
        state.data_ptr(),
        upstream.data_ptr(),
        not rows.reduce,
        float(scale) if rows.reduce else 1.0,
        NOTHING if of_queries is None else _heads(of_queries),
        NOTHING if of_keys is None else _heads(of_keys),
        rows.same,
    )
    return (of_keys, None) if rows.same else (of_queries, of_keys)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """In the order of ``like``; what takes no part stays 0."""
    return torch.zeros_like(like, dtype=dtype)


def _numbers(rows: AttentionRows) -> tuple[float, ...]:
    """csrc/bindings.cpp takes it apart in this order."""
    batch, _, length, _ = rows.student_queries.shape
    return (
        *_heads(rows.student_queries),
        *_heads(rows.student_keys),
        *_heads(rows.teacher_queries),
        *_heads(rows.teacher_keys),
        batch,
        length,
        rows.student_keys.shape[2],
        0 if rows.key_mask is None else rows.key_mask.data_ptr(),
        0 if rows.query_mask is None else rows.query_mask.data_ptr(),
        rows.causal,
        rows.scale,
        rows.teacher_scale,
        torch.get_num_threads(),
    )


def _heads(x: Tensor) -> tuple[int, ...]:
    batch, head, token, _ = x.stride()
    address = x.data_ptr()
    if not address and x.numel():
        raise ValueError(f"fastkd: a tensor of shape {tuple(x.shape)} must have memory, got none (freed by resize_?)")
    return address, batch, head, token, DTYPES[x.dtype], x.shape[1], x.shape[3]
