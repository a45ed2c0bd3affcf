"""What a kernel is judged by: inputs that can fail, and a bar that separates rounding from error.

For this library's tests and benches, and for tests of code that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Outputs = Tensor | Sequence[Tensor]


def flat_logits(rows: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(rows, vocabulary)`` standard normal logits: every id has some probability, so an error in a tail shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator).to(dtype)


def peaked_logits(rows: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like :func:`flat_logits`, with three ids a row made 20 times larger.

    Without peaks all probabilities of a large vocabulary are nearly 0, and a wrong one goes unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator)
    ids = torch.randint(vocabulary, (rows, min(3, vocabulary)), generator=generator)
    return logits.scatter(1, ids, 20 * logits.gather(1, ids)).to(dtype)


def assert_as_exact_as_fp32(
    got: Outputs,
    compute: Callable[..., Outputs],
    *inputs: Tensor,
    factor: float = 256.0,
    copies: int = 8,
    slack: Sequence[Tensor | float] | None = None,
) -> None:
    """Assert, element by element, ``|got - exact| <= u |exact| + factor * E``.

    ``exact`` is ``compute`` in float64 of the unrounded inputs, u the epsilon of got's dtype (near 0 its smallest step)
    and E, one number a row, the largest ``|compute in float32 - exact|`` over the inputs and over copies of them
    jittered by one float32 ulp: a single float32 evaluation can be exact by luck. Where exact is not finite, got has to
    be the same infinity, or NaN.

    Args:
        got: One tensor or several, each with the rows in its first dimension; or 0-dim, where ``compute`` gives rows
            that add up to it: it is judged by the sum of their E.
        compute: Called with float64 and with float32 copies of the inputs; returns what ``got`` should be.
        inputs: The tensors that ``got`` was computed from, in their own dtypes.
        factor: 256 separates sound kernels (at most 193) from the mildest bug that was injected (1500).
        copies: How many jittered copies.
        slack: What to allow more, for each output; for kinks, where any subgradient is right.

    Raises:
        AssertionError: naming the worst element.

    Example:
        >>> x = flat_logits(4, 100)
        >>> assert_as_exact_as_fp32(x.softmax(-1), lambda x: x.softmax(-1), x)
    """
    outputs = _tuple(got)
    exact, error = exact_and_error(compute, *inputs, copies=copies)
    assert len(outputs) == len(exact), f"{len(outputs)} outputs, {len(exact)} expected"
    for i, (one, want, bound) in enumerate(zip(outputs, exact, error, strict=True)):
        allowed = slack[i] if slack is not None else 0.0
        _check(i, one, want, bound, factor, allowed)


def exact_and_error(
    compute: Callable[..., Outputs], *inputs: Tensor, copies: int = 8
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``compute`` in float64, and the error E that float32 makes in each row: both as tuples, one for each output."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = _tuple(compute(*wide))
    errors = [torch.zeros(len(x), dtype=torch.float64, device=x.device) for x in exact]
    generator = torch.Generator().manual_seed(0)
    for copy in range(copies + 1):
        narrow = [_jitter(x.float(), generator) if copy and x.is_floating_point() else x for x in inputs]
        narrow = [x.float() if x.is_floating_point() else x for x in narrow]
        truth = exact if copy == 0 else _tuple(compute(*(x.double() if x.is_floating_point() else x for x in narrow)))
        for i, (rounded, true) in enumerate(zip(_tuple(compute(*narrow)), truth, strict=True)):
            difference = torch.where(true.isfinite() & rounded.isfinite(), (rounded.double() - true).abs(), 0.0)
            errors[i] = torch.maximum(errors[i], difference.reshape(len(true), -1).amax(-1) if len(true) else errors[i])
    return exact, tuple(errors)


def _jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    up = torch.randint(2, x.shape, generator=generator).to(x.device) == 1
    infinity = torch.full_like(x, float("inf"))
    return torch.where(x.isfinite(), torch.nextafter(x, torch.where(up, infinity, -infinity)), x)


def _check(index: int, got: Tensor, exact: Tensor, error: Tensor, factor: float, slack: Tensor | float) -> None:
    info = torch.finfo(got.dtype)
    if got.ndim == 0 and exact.ndim == 1:
        exact, error = exact.sum(), error.sum()
    assert got.shape == exact.shape, f"output {index} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    value = got.double()
    error = error.reshape(-1, *[1] * (exact.ndim - 1)) if exact.ndim else error
    bound = info.eps * exact.abs() + factor * error + info.smallest_normal * info.eps + slack
    same = (value == exact) | (value.isnan() & exact.isnan())
    fine = same | (exact.isfinite() & ((value - exact).abs() <= bound))
    if bool(fine.all()):
        return
    excess = torch.where(fine, 0.0, (value - exact).abs() / bound).nan_to_num(nan=float("inf"), posinf=float("inf"))
    where = torch.unravel_index(excess.argmax(), excess.shape) if exact.ndim else ()
    at = tuple(int(i) for i in where)
    raise AssertionError(
        f"output {index}: {int((~fine).sum())} of {fine.numel()} elements are off, worst at {at}: "
        f"got {value[at].item()!r}, exact {exact[at].item()!r}, allowed {bound[at].item():.3g}"
    )


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
