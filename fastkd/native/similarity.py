"""Losses of similarities: what ``fastkd/_similarity.py`` says, in C++ (csrc/cpu/similarity_rows.h)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _similarity
from . import _products, extension
from .logit import CPU

_C = extension()


def _compare(student: Tensor, teacher: Tensor, eps: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    slopes = torch.empty_like(student) if gradient else None
    address = 0 if slopes is None else slopes.data_ptr()
    total = _C.compare_similarities(
        student.data_ptr(), teacher.data_ptr(), *student.shape, eps, torch.get_num_threads(), address
    )
    return torch.tensor(total, dtype=torch.float64, device=CPU), slopes


pkt_loss = partial(_similarity.pkt_loss, _products, _compare)
correlation_congruence_loss = partial(_similarity.correlation_congruence_loss, _products)
