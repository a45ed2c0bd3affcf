"""The gradient of a reference on features: torch's own differentiation of the formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._features import Result


def value_and_gradient(formula: Callable[[Tensor], Tensor], student: Tensor, gradient: bool) -> Result:
    """``student`` in the dtype of the computation."""
    if not gradient:
        return formula(student), None
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        loss = formula(leaf)
        (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope
