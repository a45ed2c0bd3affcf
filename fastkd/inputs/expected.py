"""A teacher known by its expected embedding under the student's frozen head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import _checks
from ._checksum import checksum
from .head import Head
from .topk import _by_rows


@dataclass(frozen=True, eq=False)
class Expected:
    """All that forward KL needs of a teacher where the student's head is frozen: one vector a token.

    With p the teacher's distribution and W, b the student's weight and bias, ``mean = p @ W``, ``bias = p @ b``. The
    gradient to the student's hidden states is that of the whole teacher, at the cost of cross-entropy. For forward_kl
    and cross_entropy.

    Args:
        mean: ``(..., H)``, any float dtype.
        bias: ``(...,)``, where the student's head has a bias.
        entropy: ``(...,)``, the teacher's in nats. Without it the value of forward_kl is that of cross_entropy, which
            is larger by the entropy; the gradient is the same.
        temperature: The teacher's, at which it was made: a loss has to use it.
        checksum: Of the weights it was made with, as :meth:`from_teacher` sets it; a loss refuses others. None: not
            compared.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes that do not fit. From the losses: a student that is no :class:`fastkd.Head`, or whose weight
            or bias requires a gradient, or with a softcap; another temperature or divergence; other weights.

    Source: the linearity of cross-entropy in the teacher's probabilities.

    Example:
        >>> weight = torch.eye(3)
        >>> teacher = Expected.from_teacher(torch.zeros(2, 3), weight)
        >>> teacher.mean[0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    mean: Tensor
    _: KW_ONLY
    bias: Tensor | None = None
    entropy: Tensor | None = None
    temperature: float = 1.0
    checksum: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("bias", self.bias), ("entropy", self.entropy)):
            if value is None and name != "mean":
                continue
            if not isinstance(value, Tensor):
                _checks.bad_type("Expected", name, "be a tensor", type(value).__name__)
            if value.dtype not in _checks.FLOATS:
                _checks.bad_type("Expected", name, "be float16, bfloat16, float32 or float64", value.dtype)
            if value.device != self.mean.device:
                _checks.bad_value("Expected", name, f"be where the mean is, {self.mean.device}", value.device)
        if self.mean.ndim == 0:
            _checks.bad_value("Expected", "mean", "have a last dimension, the hidden size", "a 0-dim tensor")
        for name, value in (("bias", self.bias), ("entropy", self.entropy)):
            if value is not None and value.shape != self.mean.shape[:-1]:
                rule = f"have one number per row, {tuple(self.mean.shape[:-1])}"
                _checks.bad_value("Expected", name, rule, tuple(value.shape))
        _checks.positive("Expected", "temperature", self.temperature)

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.mean, self.bias, self.entropy) if x is not None)

    @classmethod
    def from_teacher(
        cls,
        teacher: Tensor | Head,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> Expected:
        """From a teacher's logits ``(..., V)`` or head, and the student's ``weight`` ``(V, H)`` and ``bias`` ``(V,)``.

        Computed a few rows at a time, with the logits in float32 or wider.

        Example:
            >>> Expected.from_teacher(torch.zeros(1, 2), torch.eye(2)).entropy
            tensor([0.6931])
        """
        temperature = _checks.positive("Expected.from_teacher", "temperature", temperature)
        if not isinstance(teacher, Head):
            _checks.logits("Expected.from_teacher", "teacher", teacher, "a tensor of logits or a Head")
        if teacher.shape[-1] != len(weight):
            rule = f"have the teacher's vocabulary, {teacher.shape[-1]}, as its rows"
            _checks.bad_value("Expected.from_teacher", "weight", rule, tuple(weight.shape))
        shape = teacher.shape[:-1]
        with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
            parts = [_moments(logits, weight, bias, temperature) for _, logits in _by_rows(teacher)]
            mean, offset, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(
            mean.view(*shape, weight.shape[1]),
            bias=None if bias is None else offset.view(shape),
            entropy=entropies.view(shape) if entropy else None,
            temperature=temperature,
            checksum=checksum(weight, bias),
        )


def _moments(logits: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Sequence[Tensor]:
    wide = torch.float64 if torch.float64 in (logits.dtype, weight.dtype) else torch.float32
    log_p = torch.log_softmax(logits.to(wide) / temperature, -1)
    p = log_p.exp()
    offset = p.new_zeros(len(p)) if bias is None else torch.where(p == 0, 0.0, p * bias.to(wide)).sum(-1)
    step = max(1, 2**22 // max(1, weight.shape[1]))
    mean = p.new_zeros(len(p), weight.shape[1])
    for begin in range(0, len(weight), step):
        mean.addmm_(p[:, begin : begin + step], weight[begin : begin + step].to(wide))
    return mean, offset, -torch.where(p == 0, 0.0, p * log_p).sum(-1)
