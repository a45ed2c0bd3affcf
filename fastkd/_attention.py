"""What every implementation of a loss on attention scores is asked, and what it hands back.

``losses/attention.py`` checks a user's arguments and turns them into one :class:`AttentionRows`. A row is a query of a
head. Each implementation has two functions with the same signature::

    forward(rows)                                    -> loss, state, scale
    backward(rows, state, scale, grad_loss, wanted)  -> grad_queries, grad_keys

``loss`` is ``(B, H, L)`` when ``rows.reduce`` is false and 0-dim otherwise: the sum over the rows times ``scale``, in a
fixed order, where ``scale`` (a float, or a 0-dim float64 tensor) is 1 / divisor, and 0 where the divisor is 0.
``state`` is a float64 tensor ``(B, H, L, STATE_WIDTH)``, the same in every implementation, with the columns below. The
gradients have the student's shapes and dtypes; ``wanted`` says of queries and keys who needs one, and the other is
None. Where ``rows.same``, queries and keys are one tensor: ``grad_queries`` is its whole gradient, rounded to storage
once, and ``grad_keys`` None.

A row that sees no key, or that ``query_mask`` drops, counts in nothing, and a key that ``key_mask`` drops is seen by
nobody: what they hold does not matter, their gradient is 0, and the row's state is 0. A NaN or an infinity in a query
makes its row NaN, one in a key every row that sees it; the gradients of such a row's query, and of all keys that it
sees, are NaN. Nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

COUNTS = 0  # 1, or 0 for a row that counts in nothing
STUDENT_MAX = 1  # max of q k over the keys that the row sees, before its scale
STUDENT_LOGSUM = 2  # log sum exp(scale * (q k - max)) over them
TEACHER_MAX = 3
TEACHER_LOGSUM = 4
STATE_WIDTH = 5


@dataclass(slots=True)
class AttentionRows:
    """A checked problem. Tensors have a last dimension of stride 1, and any other strides."""

    student_queries: Tensor  # (B, H, L, D) float16/32/64 or bfloat16
    student_keys: Tensor  # (B, G, S, D) of the same dtype; H is a multiple of G, and heads in a row share one
    teacher_queries: Tensor  # (B, H, L, E); the dtype may differ from the student's
    teacher_keys: Tensor  # (B, F, S, E)
    key_mask: Tensor | None  # (B, S) bool, contiguous; True takes part
    query_mask: Tensor | None  # (B, L)
    causal: bool  # a query sees the keys up to its own position; L is S
    scale: float
    teacher_scale: float
    divisor: float | None  # None: how many rows count
    reduce: bool
    same: bool  # the student's queries and keys are one tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_queries, self.student_keys, self.teacher_queries, self.teacher_keys
