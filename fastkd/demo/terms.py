"""What a teacher of digits can teach beside its logits: its features, and how the images of a batch relate in them.

The weights were chosen on other seeds than those that are shown (10, 11, 12).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastkd

from ..distill import Term


def features(loss: Callable[..., Any], weight: float, **options: Any) -> Term:
    return Term(loss, "body", "body", weight=weight, **options)


# Of a network's last hidden layer. The two of distances and angles are in the proportion of their paper.
TERMS: dict[str, Callable[[], list[Term]]] = {
    "hint_loss of adapted features": lambda: [features(fastkd.hint_loss, 10.0, adapt="linear")],
    "rkd_distance_loss + rkd_angle_loss": lambda: [
        features(fastkd.rkd_distance_loss, 25.0),
        features(fastkd.rkd_angle_loss, 50.0),
    ],
    "cosine_relation_loss": lambda: [features(fastkd.cosine_relation_loss, 30.0)],
    "similarity_preserving_loss": lambda: [features(fastkd.similarity_preserving_loss, 3000.0)],
    "pkt_loss": lambda: [features(fastkd.pkt_loss, 3e4)],
    "cka_loss": lambda: [features(fastkd.cka_loss, 10.0)],
}
