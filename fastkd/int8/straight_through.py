"""Rounding as int8 layers round, with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._int8 import LEVELS, compute_dtype


def fake_quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    r"""Round to the numbers that int8 has, and let gradients pass. Same value as::

        (x / scale).round().clamp(-127, 127) * scale

    computed in float32 (float64 of float64) and rounded to the dtype of ``x`` once. The gradient is that of the
    identity where the clamp changes nothing, and 0 where it does. An infinity is clamped like any number; the layers of
    :func:`prepare_qat_` make NaN of its row or image before, as int8 layers do.

    Args:
        x: Of any float dtype.
        scale: Step of the numbers: a number, or a tensor that broadcasts to ``x``, such as ``(N, 1)`` for the rows of a
            weight. A constant: it gets no gradient. Where it is 0, so is the result.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a scale on another device, that requires a gradient, or that does not broadcast to ``x``; a number
            that is negative, infinite or NaN.

    Source: Bengio et al. 2013, arXiv 1308.3432 (the straight-through estimator); Jacob et al. 2018, arXiv 1712.05877.

    Example:
        >>> x = torch.tensor([0.26, -0.9, 40.0], requires_grad=True)
        >>> fake_quantize(x, 0.25)
        tensor([ 0.2500, -1.0000, 31.7500], grad_fn=<AddBackward0>)
        >>> fake_quantize(x, 0.25).sum().backward()
        >>> x.grad
        tensor([1., 1., 0.])
    """
    _checks.floats("fake_quantize", "x", x)
    step = _step(x, scale)
    values = x.detach().to(step.dtype)
    steps = torch.where(values == 0, 0.0, values / step).round()  # 0 / 0 is 0 here
    rounded = (steps.clamp(-LEVELS, LEVELS) * step).to(x.dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return rounded
    # x - x.detach() is exactly 0, but for an infinity, which the mask keeps out.
    return rounded + torch.where(steps.abs() <= LEVELS, x - x.detach(), 0.0)


def _step(x: Tensor, scale: Tensor | float) -> Tensor:
    dtype = compute_dtype(x.dtype)
    if not isinstance(scale, Tensor):
        # Filled on the device: a host tensor would have to be copied there.
        return torch.full((), _checks.not_negative("fake_quantize", "scale", scale), dtype=dtype, device=x.device)
    _checks.floats("fake_quantize", "scale", scale)
    _checks.constant("fake_quantize", "scale", scale)
    if scale.device != x.device:
        _checks.bad_value("fake_quantize", "scale", f"be on the device of x, {x.device}", scale.device)
    try:
        fits = torch.broadcast_shapes(x.shape, scale.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        _checks.bad_value(
            "fake_quantize", "scale", f"broadcast to the shape of x, {tuple(x.shape)}", tuple(scale.shape)
        )
    return scale.to(dtype)
