r"""How student and teacher order the classes of each row, and the rows of each class: by correlation.

With q = softmax(s / T) and p = softmax(t / T), both (N, C), and r the Pearson correlation::

    loss = T**2 (beta (1 - mean_b r(q_b, p_b)) + gamma (1 - mean_c r(q_:c, p_:c)))
    r(x, y) = x'.y' / (|x'| |y'| + 1e-8)        x' = x - mean(x)

Where x' or y' is 0, so is r, and its gradient, whose limit depends on the direction.

Source: Huang et al. 2022, arXiv 2205.10536.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result, result_dtype
from ._gradient import value_and_gradient

EPS = 1e-8


def dist_loss(
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    factor: float,
) -> Result:
    """``factor``: T**2, or 1."""
    dtype = result_dtype(student, teacher)
    p = (teacher.tensor.to(dtype) / temperature).softmax(-1)

    def formula(logits: Tensor) -> Tensor:
        if len(logits) == 0:
            return logits.sum()
        q = (logits / temperature).softmax(-1)
        loss = logits.new_zeros(())
        if beta:
            loss = loss + beta * (1 - _correlation(q, p, 1).mean())
        if gamma:
            loss = loss + gamma * (1 - _correlation(q, p, 0).mean())
        return factor * loss

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = _centred(x, dim), _centred(y, dim)
    squares, others = x.square().sum(dim), y.square().sum(dim)
    known = (squares != 0) & (others != 0)
    lengths = torch.where(known, squares, 1.0).sqrt() * torch.where(known, others, 1.0).sqrt()
    return torch.where(known, (x * y).sum(dim) / (lengths + EPS), 0.0)


def _centred(x: Tensor, dim: int) -> Tensor:
    """From the first on, so that what is constant becomes 0 exactly."""
    x = x - x.narrow(dim, 0, 1)
    return x - x.mean(dim, keepdim=True)
