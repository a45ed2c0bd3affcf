"""Weights of rows against their formulas, by a loop over the rows."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_models import Net, vectors
from torch import Tensor

import fastkd
from fastkd.distill import WSLD, Distiller, Focal, LossQuantile, OfBatch, TeacherGap, Term

ALL = [WSLD(), TeacherGap(), TeacherGap(power=0.5), Focal(), Focal(gamma=0.0), LossQuantile(0.3)]


def naive(kind: Any, student: Tensor, teacher: Tensor, target: Tensor) -> list[float]:
    student, teacher = student.double(), teacher.double()
    counts = [i for i in range(len(target)) if target[i] != -100]
    hard = {i: F.cross_entropy(student[i], target[i]).item() for i in counts}
    taught = {i: F.cross_entropy(teacher[i], target[i]).item() for i in counts}
    weights = dict.fromkeys(range(len(target)), 0.0)
    hardest = sorted(counts, key=lambda i: -hard[i])[: -int(-0.3 * len(counts) // 1)]
    for i in counts:
        if isinstance(kind, WSLD):
            weights[i] = 1 - torch.tensor(-hard[i] / (taught[i] + 1e-7)).exp().item()
        elif isinstance(kind, TeacherGap):
            weights[i] = ((student[i].softmax(0) - teacher[i].softmax(0)).abs().sum() / 2).item() ** kind.power
        elif isinstance(kind, Focal):
            weights[i] = (1 - student[i].softmax(0)[target[i]].item()) ** kind.gamma
        else:
            weights[i] = float(i in hardest)
    return list(weights.values())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ALL, ids=repr)
def test_formulas(kind: Any, normalize: bool) -> None:
    student, teacher = torch.randn(2, 11, 5) * 3
    target = torch.randint(5, (11,))
    target[[2, 7]] = -100
    student[7] = torch.nan  # in a row that does not count
    student.requires_grad_()
    want = torch.tensor(naive(kind, student, teacher, target))
    if normalize:
        kind = type(kind)(**{**vars(kind), "normalize": True})
        want *= 9 / want.sum()
    got = kind(student, teacher, target)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    assert not normalize or round(got.sum().item(), 5) == 9
    assert pickle.loads(pickle.dumps(kind)) == kind
    maps = [side.T.reshape(1, 5, 11, 1) for side in (student, teacher)]
    torch.testing.assert_close(kind(*maps, target.view(1, 11, 1), dim=1), want.view(1, 11, 1))


@pytest.mark.parametrize("kind", ALL, ids=repr)
def test_extremes(kind: Any) -> None:
    assert kind(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)
    ignored = torch.tensor([-100, -100])
    normal = type(kind)(**{**vars(kind), "normalize": True})
    for weigh in (kind, normal):
        assert weigh(torch.zeros(2, 3), torch.zeros(2, 3), ignored).tolist() == [0, 0]
    far, masked = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[0.0, 1.0, -torch.inf]])
    for student, teacher in ((far, -far), (masked, far), (far, far)):
        assert normal(student, teacher, torch.tensor([2])).isfinite().all()
        assert kind(student.half(), teacher, torch.tensor([1])).dtype is torch.float32


def test_quantiles() -> None:
    teacher = torch.zeros(4, 2)
    student = torch.tensor([[0.0, 3.0], [0.0, 0.0], [0.0, -2.0], [0.0, 3.0]])
    assert LossQuantile(0.5, by="forward_kl")(student, teacher, None).tolist() == [1, 0, 0, 1]
    assert LossQuantile(0.5)(student, None, torch.tensor([0, 0, 1, 1])).tolist() == [1, 0, 1, 0]
    assert LossQuantile(0.26)(teacher, None, torch.zeros(4, dtype=torch.long)).tolist() == [1, 1, 0, 0]
    assert LossQuantile(1.0)(teacher, None, torch.tensor([0, -100, 1, 0])).tolist() == [1, 0, 1, 1]
    certain = torch.tensor([[0.0, 0.0], [1e4, 0.0]])  # a loss of 0, behind a row that does not count
    assert LossQuantile(1.0)(certain, None, torch.tensor([-100, 0])).tolist() == [0, 1]
    for rows in range(1, 60):
        for tenths in range(1, 11):
            taken = LossQuantile(tenths / 10)(torch.zeros(rows, 2), None, torch.zeros(rows, dtype=torch.long)).sum()
            assert taken == -(-rows * tenths // 10)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"LossQuantile: fraction must be more than 0 and at most 1, got 0"):
        LossQuantile(0)
    with pytest.raises(ValueError, match="Focal: gamma must be finite and not negative, got -1"):
        Focal(-1)
    for kind in (WSLD(), Focal(), LossQuantile(0.5)):
        with pytest.raises(TypeError, match=f"{type(kind).__name__}: target must be the labels"):
            kind(torch.zeros(1, 2), torch.zeros(1, 2), None)
    with pytest.raises(ValueError, match="divergence must be one of"):
        LossQuantile(0.5, by="huber")(torch.zeros(1, 2), torch.zeros(1, 2), None)


@pytest.mark.parametrize("kind", ALL, ids=repr)
def test_an_ignore_index_that_is_no_class(kind: Any) -> None:
    """As 255 on the maps of many data sets."""
    student, teacher, (x, y) = Net(6).eval(), Net(6).eval(), vectors(8)
    y[2] = 255
    keep = y != 255
    loss, _ = Distiller(student, teacher, [Term(fastkd.kd_loss, row_weight=kind, ignore_index=255)]).loss((x, y))
    own, taught = student(x)[keep], teacher(x)[keep]
    torch.testing.assert_close(loss, fastkd.kd_loss(own, taught, y[keep], row_weight=kind(own, taught, y[keep])))


def test_in_terms() -> None:
    student, teacher, (x, y) = Net(6).eval(), Net(6).eval(), vectors(8)
    fixed = torch.rand(8)
    terms = [
        Term(fastkd.kd_loss, row_weight=LossQuantile(0.5), name="hardest"),
        Term(fastkd.kd_loss, row_weight=Focal(), target=False, name="focal"),  # labels weigh, and are not learned
        Term(fastkd.cross_entropy, row_weight=Focal(), ignore_index=3, name="labels"),
        Term(fastkd.kd_loss, row_weight=fixed, name="fixed"),
        Term(fastkd.kd_loss, row_weight=OfBatch(2), name="batch"),
    ]
    distiller = Distiller(student, teacher, terms)
    loss, parts = distiller.loss((x, y, 2 * fixed))
    loss.backward()
    own, taught = student(x), teacher(x)
    hardest = LossQuantile(0.5)(own, taught, y)
    assert hardest.sum() == 4
    focal = (1 - own.softmax(-1).gather(1, y[:, None])[:, 0]).square().detach()
    weighted = fastkd.kd_loss(own, taught, y, row_weight=fixed)
    want = {
        "hardest": fastkd.kd_loss(own, taught, y, row_weight=hardest),
        "focal": fastkd.kd_loss(own, taught, row_weight=focal),
        "labels": fastkd.cross_entropy(own, y, row_weight=focal, ignore_index=3),
        "fixed": weighted,
        "batch": weighted,
    }
    torch.testing.assert_close(parts, {name: value.detach() for name, value in want.items()})
