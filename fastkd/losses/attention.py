"""Distillation of attention without its matrices: :func:`attention_kl_loss`, :func:`minilm_loss` and their modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._attention import AttentionRows
from . import _attention_operators
from ._attention_arguments import Scores
from ._attention_autograd import AttentionLoss, Pending

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP = "attention_kl_loss"


class AttentionKLOptions(TypedDict, total=False):
    """The keyword arguments of :func:`attention_kl_loss`."""

    causal: bool
    key_mask: Tensor | None
    query_mask: Tensor | None
    scale: float | None
    teacher_scale: float | None
    relation_heads: int | None
    reduction: str
    impl: str | None


class MiniLMOptions(TypedDict, total=False):
    """The keyword arguments of :func:`minilm_loss`."""

    relation_heads: int
    weights: Sequence[float] | None
    causal: bool
    mask: Tensor | None
    reduction: str
    impl: str | None


def attention_kl_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    relation_heads: int | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    r"""Match a student's attention to a teacher's, of their queries and keys: KL(teacher | student) of every query.

    Computes, a tile at a time and with a few numbers a row kept for backward::

        log_q = F.log_softmax(q_s @ k_s.mT / q_s.shape[-1] ** 0.5, -1)  # (B, H, L, S)
        log_p = F.log_softmax(q_t @ k_t.mT / q_t.shape[-1] ** 0.5, -1)
        rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (B, H, L)
        loss = rows.mean()

    The teacher is a constant: it never gets a gradient. ``k_s`` may be ``q_s`` itself (relations of queries with
    queries, say); its one gradient is then rounded to its dtype once.

    Args:
        q_s: The student's queries ``(B, H, L, D)``, or ``(H, L, D)``; float16, bfloat16, float32 or float64, in any
            memory order with a last dimension of stride 1 (others cost a copy). After rotary embedding, if any.
        k_s: The student's keys ``(B, G, S, D)`` of the same dtype; G divides H, and heads in a row share one of them
            (grouped-query attention).
        q_t: The teacher's queries ``(B, H, L, E)``, of any of these dtypes.
        k_t: The teacher's keys ``(B, F, S, E)`` of the dtype of q_t; F divides H.
        causal: A query sees the keys up to its own position; L must be S.
        key_mask: bool ``(B, S)``; False for keys that nobody sees, such as padding.
        query_mask: bool ``(B, L)``; False for queries that count in nothing. Nor does one that sees no key.
        scale: What the student's products are multiplied by; default ``D ** -0.5``.
        teacher_scale: The teacher's; default ``E ** -0.5``.
        relation_heads: Concatenate the heads of each tensor and split them again into so many, whatever their number
            was (MiniLMv2). D and E are then what a relation head has of the hidden size.
        reduction: ``"none"`` gives ``(B, H, L)``, with 0 where a row does not count; ``"sum"``; ``"mean"`` divides by
            the number of rows that count; ``"batchmean"`` by B (1 without).
        impl: Pin an implementation, ``"triton"``, ``"native"`` or ``"reference"``; :func:`fastkd.explain` lists them.

    Returns:
        The loss in nats: float32, or float64 if any tensor is. Where no row counts, 0 with zero gradients.
        A row that counts and has a NaN or an infinity in its query, or in a key that it sees, is NaN, and so are the
        gradients of that query and of the keys that it sees; it harms nothing else. What masks drop may hold anything.
        Products of queries and keys have to stay within float32, whatever the dtype.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the pinned implementation cannot run here. Second derivatives, ``vmap`` and ``jvp``.

    Sources: Wang et al. 2020, arXiv 2002.10957 (MiniLM: the attention of the last layer); 2012.15828 (relation heads).

    Example:
        >>> q, k = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.eye(2).unsqueeze(0)
        >>> student = torch.zeros(1, 2, 2, requires_grad=True)
        >>> loss = attention_kl_loss(student, k, q, k)
        >>> round(loss.item(), 4)
        0.1289
        >>> loss.backward()
        >>> student.grad
        tensor([[[-0.0600,  0.0600],
                 [ 0.1076, -0.1076]]])
    """
    scores = Scores(OP, q_s, k_s, q_t, k_t, relation_heads)
    rows = scores.rows(
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
        scale=scale,
        teacher_scale=teacher_scale,
        reduction=reduction,
    )
    loss = _compute(rows, impl)
    return loss.squeeze(0) if scores.flat and not rows.reduce else loss


def minilm_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    relation_heads: int,
    weights: Sequence[float] | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    r"""Match self-relations of one layer's queries, keys and values, as MiniLMv2 does: Q-Q, K-K and V-V.

    Same as::

        sum(w * attention_kl_loss(x, x, y, y, relation_heads=A) for w, x, y in zip(weights, student, teacher))

    The paper's loss of a sequence x is ``1 / (A |x|) sum_a sum_t KL(teacher | student)``, with scores divided by the
    square root of the relation heads' size and a weight of 1 for each of the three relations, averaged over sequences.
    ``reduction="mean"`` is that for sequences of one length; of different lengths, every token weighs the same here,
    and every sequence there (``"none"`` hands out the rows for that).

    Args:
        student: Tensors ``(B, H, L, D)`` or ``(H, L, D)``, such as queries, keys and values of one layer. The number of
            heads may differ from one to the next (keys and values of grouped-query attention have fewer). Hidden states
            ``(B, L, D)`` are one head: ``x.unsqueeze(1)``.
        teacher: As many tensors, for the same tokens; sizes of heads and their number may differ.
        relation_heads: A: into how many heads each tensor is split, after its own are concatenated. The paper takes
            more than the student has (48 and 64 for the base and the large teacher).
        weights: One number for each relation; default 1. A relation of weight 0 may hold anything.
        causal: A token sees those up to its own.
        mask: bool ``(B, L)``, False for padding, which neither counts nor is seen.
        reduction: As in :func:`attention_kl_loss`; ``"none"`` gives ``(B, A, L)``.
        impl: As there.

    Returns:
        As :func:`attention_kl_loss` does.

    Raises:
        TypeError, ValueError, RuntimeError: as there.

    Sources: Wang et al. 2021, arXiv 2012.15828.

    Example:
        >>> student, teacher = torch.randn(3, 2, 4, 8, 16).unbind(), torch.randn(3, 2, 6, 8, 32).unbind()
        >>> bool(minilm_loss(student, teacher, relation_heads=16) > 0)
        True
    """
    op = "minilm_loss"
    _checks.count(op, "relation_heads", relation_heads)
    for name, tensors in (("student", student), ("teacher", teacher)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            _checks.bad_type(op, name, "be a sequence of tensors", type(tensors).__name__)
        if not tensors:
            _checks.bad_value(op, name, "have a tensor", "none")
    if len(teacher) != len(student):
        _checks.bad_value(op, "teacher", f"have as many tensors as the student, {len(student)}", len(teacher))
    if weights is None:
        weights = (1.0,) * len(student)
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        _checks.bad_type(op, "weights", "be a sequence of numbers", type(weights).__name__)
    if len(weights) != len(student):
        _checks.bad_value(op, "weights", f"have one number for each relation, {len(student)}", len(weights))
    numbers = [_checks.finite(op, "weights", weight) for weight in weights]
    options: dict[str, Any] = {"causal": causal, "key_mask": mask, "query_mask": mask, "reduction": reduction}
    losses = []
    for weight, x, y in zip(numbers, student, teacher, strict=True):
        if weight == 0:  # then it may hold anything: the rows count as they do elsewhere, and their loss is 0
            x, y = x.flatten()[:0].sum() + torch.zeros_like(x), torch.zeros_like(y)
        scores = Scores(op, x, x, y, y, relation_heads)
        loss = _compute(scores.rows(**options, scale=None, teacher_scale=None), impl)
        losses.append(weight * (loss.squeeze(0) if scores.flat and loss.ndim else loss))
    return torch.stack(losses).sum(0)


class AttentionKLLoss(torch.nn.Module):
    """:func:`attention_kl_loss` with its keyword arguments held; a call may replace some, such as ``key_mask``.

    Example:
        >>> criterion = AttentionKLLoss(causal=True)
        >>> q, k = torch.randn(2, 1, 4, 8, 16)
        >>> criterion(q, k, q, k)
        tensor(0.)
    """

    def __init__(self, **options: Unpack[AttentionKLOptions]) -> None:
        super().__init__()
        self.options = _known(type(self).__name__, OP, options, AttentionKLOptions)

    def forward(
        self, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, **options: Unpack[AttentionKLOptions]
    ) -> Tensor:
        return attention_kl_loss(q_s, k_s, q_t, k_t, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MiniLMLoss(torch.nn.Module):
    """:func:`minilm_loss` with its keyword arguments held; a call may replace some, such as ``mask``.

    Example:
        >>> criterion = MiniLMLoss(relation_heads=4)
        >>> layer = torch.randn(3, 2, 4, 8, 16).unbind()
        >>> criterion(layer, layer)
        tensor(0.)
    """

    def __init__(self, **options: Unpack[MiniLMOptions]) -> None:
        super().__init__()
        self.options = _known(type(self).__name__, "minilm_loss", options, MiniLMOptions)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], **options: Unpack[MiniLMOptions]) -> Tensor:
        return minilm_loss(student, teacher, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _known(module: str, op: str, options: Any, names: Any) -> dict[str, Any]:
    for name in options:
        if name not in names.__annotations__:
            raise TypeError(f"{module}: {name} must be a keyword argument of {op}, got {name}")
    return dict(options)


def _compute(rows: AttentionRows, impl: str | None) -> Tensor:
    if torch.compiler.is_compiling() or not _lie_in_memory(rows):
        return _attention_operators.apply(rows, impl)
    implementation = _dispatch.pick(OP, impl, rows.student_queries, (rows.teacher_queries,))
    keys = None if rows.same else rows.student_keys
    loss: Tensor = AttentionLoss.apply(rows.student_queries, keys, Pending(rows, implementation))
    return loss


def _lie_in_memory(rows: AttentionRows) -> bool:
    """Whether their values can be read where the tensors point; not those of a tracer, nor a lazy minus sign."""
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg() for x in rows.tensors)
