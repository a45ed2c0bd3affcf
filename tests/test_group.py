"""Losses on relations whose batch lies on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feature_problems import flat
from processes import run_ranks

import fastkd

TWO_RANKS = """
    import functools, os, sys, warnings
    import torch, torch.distributed as dist
    warnings.filterwarnings("ignore")
    import fastkd
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    torch.manual_seed(0)
    x, teacher = torch.randn(8, 5), torch.randn(8, 3)
    LOSSES = {
        "gram": fastkd.gram_loss, "cosine": fastkd.cosine_relation_loss, "cka": fastkd.cka_loss,
        "similarity": fastkd.similarity_preserving_loss, "distance": fastkd.rkd_distance_loss,
        "angle": fastkd.rkd_angle_loss, "pkt": fastkd.pkt_loss, "congruence": fastkd.correlation_congruence_loss,
        "congruence of unit rows": functools.partial(fastkd.correlation_congruence_loss, normalize_rows=True),
    }

    def part_of(sizes):
        first = sum(sizes[:rank])
        return slice(first, first + sizes[rank])

    def gradients(model, rows, loss, **options):
        model.zero_grad()
        value = loss(model(x[rows]), teacher[rows], **options)
        value.backward()
        return value.detach(), [p.grad.clone() for p in model.parameters()]

    def same(got, want):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    def refused(call, *words):
        try:
            call()
        except ValueError as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(words)
"""

DDP = """
    model = torch.nn.Linear(5, 7)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for name, loss in LOSSES.items():
        whole = gradients(model, slice(0, 8), loss)
        assert max(float(g.abs().max()) for g in whole[1]) > 1e-3
        for sizes in ((3, 5), (4, 4), (8, 0), (0, 8)):
            same(gradients(parallel, part_of(sizes), loss, group=group), whole)
        # By itself, a rank's gradient is twice that of its rows: DDP halves the sum.
        rows = part_of((3, 5))
        student = torch.randn(8, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
        loss(student, teacher).backward()
        mine = student.detach()[rows].requires_grad_()
        loss(mine, teacher[rows], group=group).backward()
        same(mine.grad, 2 * student.grad[rows])
        # What is kept of a teacher is of this rank's rows alone.
        taught = fastkd.prepare_teacher(teacher[rows])
        loss(mine, taught)
        same(loss(mine, taught, group=group), loss(student, teacher).detach())
        with torch.no_grad():
            same(loss(mine, teacher[rows], group=group), loss(student, teacher))
    print("equal")
"""

AROUND = """
    rows = part_of((3, 5))
    for name, loss in LOSSES.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            student = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            loss(student, teacher).backward()
            mine = student.detach()[rows].requires_grad_()
            loss(mine, teacher[rows], group=group).backward()
            assert mine.grad.dtype is dtype
            torch.testing.assert_close(mine.grad, 2 * student.grad[rows])
        nobody = torch.zeros(0, 7, requires_grad=True)
        value = loss(nobody, torch.zeros(0, 3), group=group)
        value.backward()
        same(value.detach(), loss(torch.zeros(0, 7), torch.zeros(0, 3)))
        assert nobody.grad.shape == (0, 7)

    student = torch.randn(8, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    fastkd.gram_loss(student, teacher).backward()
    compiled = torch.compile(lambda s, t: fastkd.gram_loss(s, t, group=group), fullgraph=True, backend="aot_eager")
    mine = student.detach()[rows].requires_grad_()
    value = compiled(mine, teacher[rows])
    value.backward()
    same((value.detach(), mine.grad), (fastkd.gram_loss(student, teacher).detach(), 2 * student.grad[rows]))

    # A wrong number raises on every rank, so that none waits for ever.
    refused(lambda: fastkd.gram_loss(torch.zeros(2, 3 + rank), torch.zeros(2, 3), group=group),
            "gram_loss: student must have rows of the same length on every rank, got [3, 4]")
    dtype = [torch.float16, torch.float32][rank]
    refused(lambda: fastkd.gram_loss(torch.zeros(2, 3), torch.zeros(2, 3).to(dtype), group=group),
            "gram_loss: teacher must have rows of the same dtype on every rank, got [torch.float16, torch.float32]")
    one = dist.new_group([1])
    if rank == 1:
        same(fastkd.gram_loss(student, teacher, group=one), fastkd.gram_loss(student, teacher))
    else:
        try:
            fastkd.gram_loss(student, teacher, group=one)
        except TypeError as error:
            assert "gram_loss: group must be a torch.distributed process group that this rank is in, got" in str(error)
        else:
            raise AssertionError
    dist.destroy_process_group()
    print("equal")
"""


def test_two_ranks(tmp_path: Path) -> None:
    """DDP's gradients are those of one process with the whole batch, however it is split."""
    outputs = run_ranks(TWO_RANKS + DDP + AROUND, tmp_path)
    assert [out.split() for out in outputs] == [["equal", "equal"], ["equal", "equal"]]


@pytest.mark.parametrize(
    "loss",
    [
        fastkd.gram_loss,
        fastkd.cosine_relation_loss,
        fastkd.similarity_preserving_loss,
        fastkd.cka_loss,
        fastkd.rkd_distance_loss,
        fastkd.rkd_angle_loss,
        fastkd.pkt_loss,
        fastkd.correlation_congruence_loss,
    ],
)
def test_group_is_a_process_group(loss: object) -> None:
    assert callable(loss)
    rule = rf"^{loss.__name__}: group must be a torch.distributed process group that this rank is in, got int$"
    with pytest.raises(TypeError, match=rule):
        loss(flat(), flat(), group=2)
    torch.testing.assert_close(loss(flat(), flat(), group=None), loss(flat(), flat()))
