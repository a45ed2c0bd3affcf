"""What a teacher of digits can teach beside its logits: its features, and how the images of a batch relate in them.

The weights were chosen on other seeds than those that are shown (10, 11, 12).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

import fastkd


@dataclass(frozen=True)
class Term:
    name: str
    weight: float
    loss: Callable[[Tensor, Tensor], Tensor]  # of the features of student (batch, D) and teacher (batch, D')
    adapter: Callable[[int, int], nn.Module] = field(default=lambda d, d_teacher: nn.Identity())  # of D and D'


def relations_of_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Both losses of the paper, in its proportion."""
    taught = fastkd.prepare_teacher(teacher)  # both need its distances
    return 25 * fastkd.rkd_distance_loss(student, taught) + 50 * fastkd.rkd_angle_loss(student, taught)


TERMS = (
    Term("hint_loss of adapted features", 10.0, fastkd.hint_loss, lambda d, to: fastkd.Adapter("linear", d, to)),
    Term("rkd_distance_loss + rkd_angle_loss", 1.0, relations_of_distances),
    Term("cosine_relation_loss", 30.0, fastkd.cosine_relation_loss),
    Term("similarity_preserving_loss", 3000.0, fastkd.similarity_preserving_loss),
    Term("pkt_loss", 3e4, fastkd.pkt_loss),
    Term("cka_loss", 10.0, fastkd.cka_loss),
)
