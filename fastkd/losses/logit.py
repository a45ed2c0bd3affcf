"""Distillation on logits: :func:`kd_loss`, :func:`cross_entropy` and the module :class:`KDLoss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import _checks, _rows
from .._rows import DIVERGENCES, LogitRows
from ..inputs import Head
from ._compute import compute
from ._logit_arguments import Given, Logits, divergence_and_beta

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LossParts(NamedTuple):
    """What a loss is made of, for logging: detached, and reduced as the loss is."""

    hard: Tensor
    """H, the cross-entropy of the student with the target, before alpha. 0 where alpha is 0 and without a target."""
    soft: Tensor
    """S, the divergence from the teachers with its T**2, before 1 - alpha. 0 where alpha is 1."""
    rows: Tensor
    """How many rows count: not dropped by ignore_index, nor of weight 0. With reduction="none", 1 or 0 a row."""
    target_agreement: Tensor
    """How often the student's best id is the target; with "mean", the fraction of rows."""
    teacher_agreement: Tensor
    """How often the student's best id is the teacher's best (of the shared ids); teachers count by their weight."""


class KDOptions(TypedDict, total=False):
    """The keyword arguments of :func:`kd_loss`."""

    divergence: str
    beta: float | None
    temperature: float | Tensor
    teacher_temperature: float | Tensor | Sequence[float | Tensor] | None
    scale_by_t2: bool
    alpha: float | Tensor
    label_smoothing: float
    z_loss: float
    ignore_index: int
    row_weight: Tensor | None
    teacher_weight: Sequence[float] | Tensor | None
    shared_vocab: int | None
    vocab_map: Tensor | None
    student_topk: int | None
    reduction: str
    normalizer: float | Tensor | None
    overwrite_student: bool
    standardize: bool
    dim: int
    impl: str | None


@overload
def kd_loss(
    student: Tensor | Head,
    teacher: Given | Sequence[Given],
    target: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[KDOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student: Tensor | Head,
    teacher: Given | Sequence[Given],
    target: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[KDOptions],
) -> tuple[Tensor, LossParts]: ...
def kd_loss(
    student: Tensor | Head,
    teacher: Given | Sequence[Given],
    target: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | Sequence[float | Tensor] | None = None,
    scale_by_t2: bool = True,
    alpha: float | Tensor = 0.5,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    teacher_weight: Sequence[float] | Tensor | None = None,
    shared_vocab: int | None = None,
    vocab_map: Tensor | None = None,
    student_topk: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    overwrite_student: bool = False,
    standardize: bool = False,
    dim: int = -1,
    impl: str | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, LossParts]:
    r"""Match a student's logits to a teacher's, and to labels, in one pass over both.

    With T the temperature, the default computes, without storing a softmax::

        hard = F.cross_entropy(student, target)
        log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
        soft = T**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss = alpha * hard + (1 - alpha) * soft

    A row that ``ignore_index`` drops counts in neither term. The teacher is a constant: it never gets a gradient. For
    language models shift the labels (pad with ``ignore_index``), never the logits: slicing ``(B, T, V)`` logits copies
    them, which costs more than the loss.

    Args:
        student: Raw logits ``(..., V)``; float16, bfloat16, float32 or float64. Gets a gradient of its dtype. Or a
            :class:`fastkd.Head`, whose logits are never all there at once.
        teacher: Raw logits of the student's shape and device, any of these dtypes (log-probabilities with
            ``teacher_temperature=1``); a :class:`fastkd.Head`; a :class:`fastkd.TopK`, known by its best ids; a
            :class:`fastkd.Expected`, known by one vector a row; or a sequence of any of these, one of each teacher.
        target: Class ids ``(...)``, the student's shape without ``dim``. Without it there is no hard term, and alpha is
            not used. A row without a label takes any valid id and ``alpha`` 0.
        divergence: What compares p = softmax(teacher / T) with q = softmax(student / T). ``"forward_kl"`` KL(p|q);
            ``"reverse_kl"`` KL(q|p); ``"jsd"`` beta KL(p|m) + (1-beta) KL(q|m), m = beta p + (1-beta) q; ``"skew_kl"``
            KL(p | beta p + (1-beta) q); ``"skew_reverse_kl"`` KL(q | beta q + (1-beta) p); ``"tvd"`` sum |p - q| / 2;
            ``"cross_entropy"`` -sum p log q; ``"mse"`` mean (student - teacher)^2 of the raw logits, without
            temperature and T^2, over the ids that are not masked (-inf) on both sides.
        beta: For jsd in (0, 1), default 0.5; for skew_* in [0, 1), default 0.1.
        temperature: T > 0 of the student; a number, or a tensor with one per row.
        teacher_temperature: The teacher's, by default the student's; a sequence holds one per teacher.
        scale_by_t2: Multiply the soft term by the student's T^2, so that its gradient does not shrink as T grows.
        alpha: Weight of the hard term, in [0, 1]; the soft term has 1 - alpha. A number, or a tensor with one per row
            (used as given).
        label_smoothing: As in ``F.cross_entropy``, in [0, 1].
        z_loss: Adds z_loss * logsumexp(student)^2 to the hard term.
        ignore_index: A row with this target is dropped whole, whatever it holds.
        row_weight: Weight of each row, ``(...)``.
        teacher_weight: One weight per teacher, or a tensor ``(..., teachers)``, used as given; default 1 / teachers.
        shared_vocab: The first n ids are common to both vocabularies: the soft term compares softmaxes over these, the
            hard term sees the student's whole vocabulary. A TopK drops other ids and is renormalised. This or
            ``vocab_map`` is needed when the sizes differ.
        vocab_map: For vocabularies in a different order, or that overlap in part: int64 ``(V_teacher,)``, for each id
            of the teachers the student's id that means the same, or -1; no id twice. The soft term compares softmaxes
            over the mapped pairs. Computed a few rows at a time, as a Head is.
        student_topk: For reverse_kl: compare the student's k best ids of each row, and all other ids as one event.
        reduction: ``"none"`` gives ``(...)``; ``"sum"``; ``"mean"`` divides by the weight of the rows that count;
            ``"batchmean"`` by ``student.shape[0]``.
        normalizer: Divide the sum by this instead, whatever the reduction: a number or a 0-dim tensor, for example the
            number of tokens of all accumulated micro-batches.
        overwrite_student: Backward may write the gradient over the student's logits, which saves an allocation of their
            size. They must be contiguous, and neither a leaf nor a view of one. A second backward, or another user of
            the logits or of a tensor they are a view of, then gets autograd's version error. Has no effect where that
            error could not come: while tracing, and under saved-tensor hooks (``torch.utils.checkpoint`` has some).
        standardize: In the soft term compare ``z = (logits - mean) / (1e-7 + std)`` of both sides, std being each row's
            unbiased standard deviation: the shape of the logits, and not how large they are. Over the compared ids
            that are no masks (-inf, or at most -1e30), for teachers with logits, two ids or more, and any divergence
            but mse. A constant row has z = 0; there the slope has no bound, and is taken as 0.
        dim: The class dimension; 1 for maps ``(N, C, H, W)``. Any but the last costs a copy, unless the memory format
            (``torch.channels_last``) has it last.
        impl: Pin an implementation, ``"triton"``, ``"native"`` or ``"reference"``; :func:`fastkd.explain` lists them.
        return_parts: Return ``(loss, LossParts)``.

    Returns:
        The loss in nats: float32, or float64 if any logits are. Where no row counts, 0 with zero gradients.
        A row where the mathematics says infinite is +inf. A row that counts and has a NaN, a +inf or no finite logit is
        NaN, and harms no other row's gradient. Finite logits beyond 1e30 in magnitude may count as 1e30.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; on the CPU also an id outside the vocabulary or a temperature <= 0
            in a row (on a GPU such a row is NaN).
        RuntimeError: the pinned implementation cannot run here. Second derivatives, ``vmap`` and ``jvp``.

    Sources: Hinton et al. 2015, arXiv 1503.02531 (T^2); Agarwal et al. 2024, arXiv 2306.13649 (generalised JSD);
    Ko et al. 2024, arXiv 2402.03898 (skew divergences); Sun et al. 2024, arXiv 2403.01878 (standardised logits).

    Example:
        >>> student = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> loss = kd_loss(student, torch.tensor([[0.0, 1.0]]), torch.tensor([1]), temperature=2.0)
        >>> round(loss.item(), 4)
        0.4072
        >>> loss.backward()
        >>> student.grad
        tensor([[ 0.3725, -0.3725]])
    """
    logits = Logits("kd_loss", student, teacher, dim, shared_vocab, vocab_map)
    _checks.choice("kd_loss", "divergence", divergence, DIVERGENCES)
    divergence, mixture = divergence_and_beta("kd_loss", divergence, beta)
    student_temperature = logits.number("temperature", temperature, _checks.positive)
    teacher_temperatures = logits.teacher_temperature(teacher_temperature, student_temperature)
    if divergence == "mse":  # it compares raw logits
        student_temperature, teacher_temperatures = 1.0, (1.0,) * len(teacher_temperatures)
    alpha = logits.number("alpha", alpha, _checks.fraction)
    rows = logits.rows(
        target,
        row_weight=row_weight,
        alpha=alpha if target is not None else 0.0,
        temperature=student_temperature,
        teacher_temperature=teacher_temperatures,
        teacher_weight=logits.teacher_weight(teacher_weight),
        divergence=divergence,
        beta=mixture,
        scale_by_t2=bool(scale_by_t2),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        standardize=logits.standardized(standardize, divergence, student_topk),
        agreement=return_parts,
        overwrite=overwrite_student,
    )
    loss, state = compute(logits, rows, impl, logits.best_of_student(student_topk, divergence))
    return (loss, _parts(logits, rows, state)) if return_parts else loss


def cross_entropy(
    student: Tensor | Head,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    overwrite_student: bool = False,
    dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy with class ids, by the kernels of :func:`kd_loss` without a teacher.

    Same value as::

        F.cross_entropy(student, target, label_smoothing=label_smoothing, ignore_index=ignore_index)

    except that no row that counts gives 0 (not NaN). The arguments, result and errors are those of :func:`kd_loss`.

    Example:
        >>> round(cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).item(), 4)
        0.6931
    """
    logits = Logits("cross_entropy", student, (), dim)
    rows = logits.rows(
        target,
        row_weight=row_weight,
        alpha=1.0,
        temperature=1.0,
        teacher_temperature=(),
        teacher_weight=(),
        divergence="forward_kl",
        beta=0.0,
        scale_by_t2=True,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        agreement=False,
        overwrite=overwrite_student,
    )
    return compute(logits, rows, impl)[0]


class KDLoss(torch.nn.Module):
    """:func:`kd_loss` with its keyword arguments held; a call may replace some, such as ``normalizer``.

    Example:
        >>> criterion = KDLoss(temperature=2.0, alpha=0.1)
        >>> loss = criterion(torch.zeros(4, 10), torch.ones(4, 10), torch.zeros(4, dtype=torch.long))
    """

    def __init__(self, **options: Unpack[KDOptions]) -> None:
        super().__init__()
        for name in options:
            if name not in KDOptions.__annotations__:
                raise TypeError(f"KDLoss: {name} must be a keyword argument of kd_loss, got {name}")
        self.options = options

    def forward(
        self,
        student: Tensor | Head,
        teacher: Given | Sequence[Given],
        target: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return kd_loss(student, teacher, target, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _parts(logits: Logits, rows: LogitRows, state: Tensor) -> LossParts:
    state = state.detach().to(logits.dtype)
    weight = state[:, _rows.WEIGHT]
    columns = (_rows.HARD, _rows.SOFT, _rows.TARGET_AGREES, _rows.TEACHER_AGREES)
    counts = weight != 0
    # A row of weight 0 contributes 0, whatever it holds.
    parts = [torch.where(counts, weight * state[:, column], 0.0) for column in columns]
    if not rows.reduce:
        hard, soft, target, teacher = (part.view(logits.shape) for part in parts)
        return LossParts(hard, soft, counts.to(state.dtype).view(logits.shape), target, teacher)
    divisor = (
        weight.sum()
        if rows.divisor is None
        else torch.as_tensor(rows.divisor, dtype=weight.dtype, device=weight.device)
    )
    hard, soft, target, teacher = (torch.where(divisor == 0, 0.0, part.sum() / divisor) for part in parts)
    return LossParts(hard, soft, counts.sum(), target, teacher)
