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
    with torch.enable_grad(), _differentiating():
        leaf = student.detach().requires_grad_()
        loss = formula(leaf)
        (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope


def gradients(
    formula: Callable[[Tensor, Tensor | None], Tensor], grad: Tensor, x: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of two tensors, in the dtype of ``grad``, or of one."""
    with torch.enable_grad(), _differentiating():
        leaves = [tensor.detach().to(grad.dtype).requires_grad_() for tensor in (x, y) if tensor is not None]
        result = formula(leaves[0], None if y is None else leaves[1])
        slopes = torch.autograd.grad(result, leaves, grad)
    return slopes[0], None if y is None else slopes[1]


def _differentiating() -> torch._C._ForceDispatchKeyGuard:
    """In an operator of a traced program, where torch leaves autograd out, as elsewhere."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(included, excluded)
