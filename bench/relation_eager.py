"""What people write today for losses on the relations of a batch, as the papers' authors published it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances by way of inner products, each batch's divided by their mean."""

    def relative(x: Tensor) -> Tensor:
        lengths = x.square().sum(1)
        squares = lengths[:, None] + lengths[None, :] - 2 * (x @ x.T)
        distances = squares.clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
        return distances / distances[distances > 0].mean()

    with torch.no_grad():
        taught = relative(teacher)
    return F.smooth_l1_loss(relative(student), taught)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Differences of all rows, (N, N, D), normalised, and their inner products, (N, N, N)."""

    def cosines(x: Tensor) -> Tensor:
        directions = F.normalize(x[None, :] - x[:, None], dim=2)
        return torch.bmm(directions, directions.mT)

    with torch.no_grad():
        taught = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), taught)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines as probabilities, compared by their KL divergence."""

    def probabilities(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p, q = probabilities(student), probabilities(teacher)
    return (q * ((q + 1e-7) / (p + 1e-7)).log()).mean()
