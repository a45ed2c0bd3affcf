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


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student @ student.T, teacher @ teacher.T)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    g, h = F.normalize(student @ student.T, dim=1), F.normalize(teacher @ teacher.T, dim=1)
    return (g - h).square().sum() / len(student) ** 2


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the N x N matrices, as their users compute it for kernels of any kind."""
    s, t = student - student.mean(0), teacher - teacher.mean(0)
    g, h = s @ s.T, t @ t.T
    return 1 - (g * h).sum() / (g.square().sum().sqrt() * h.square().sum().sqrt())  # norm() is off by 1e-3 here


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Every channel against every other, (N, C, C, positions)."""
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).square().mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher))
    return (s - t).square().mean()
