"""The loss of a Distiller against the same written out by hand, for each kind of model; and what it leaves alone."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from distill_models import Net, assert_same, everything_of, hooks, vectors
from torch import Tensor, nn

import fastkd
from fastkd.distill import Distiller, Term


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return temperature**2 * (p * (p.log() - q)).sum(-1).mean()


def quiet(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode."""
    return copy.deepcopy(model).eval()


def test_logits_and_features() -> None:
    student, teacher, batch = Net(6, dropout=0.0), Net(9), vectors()
    terms = [
        Term(fastkd.kd_loss, temperature=2.0, alpha=0.3),
        Term(fastkd.hint_loss, "body.2", "body.2", weight=0.7, adapt="linear"),
        Term(fastkd.rkd_distance_loss, "body", "body", weight=25.0),
    ]
    before = everything_of(teacher)
    distiller = Distiller(student, teacher, terms).prepare(batch)
    twin = copy.deepcopy(student)
    loss, parts = distiller.loss(batch)
    loss.backward()

    x, y = batch
    eyes, brain = quiet(teacher).body[:3], quiet(teacher)
    own = twin.body[:3](x)
    logits = twin.head(own)
    hint = F.mse_loss(distiller.adapters["hint_loss/body_2"](own), eyes(x).detach())
    kd = 0.3 * F.cross_entropy(logits, y) + 0.7 * soft(logits, brain(x).detach(), 2.0)
    relation = fastkd.rkd_distance_loss(own, eyes(x))
    want = kd + 0.7 * hint + 25 * relation
    torch.testing.assert_close(loss, want)
    assert list(parts) == ["kd_loss", "hint_loss/body.2", "rkd_distance_loss/body"]
    torch.testing.assert_close(list(parts.values()), [kd, hint, relation])
    assert not any(part.requires_grad or part.ndim for part in parts.values())
    grads = torch.autograd.grad(want, list(twin.parameters()))
    torch.testing.assert_close([parameter.grad for parameter in student.parameters()], list(grads))
    assert_same(teacher, before)
    assert hooks(student) == hooks(teacher) == 0
