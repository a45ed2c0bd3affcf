"""The same loss and gradients of compiled models and over several processes as of plain ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import Net, hooks, vectors
from processes import run_ranks
from torch import Tensor, nn

import fastkd
from fastkd.distill import Capture, Distiller, Term

TERMS = [
    Term(fastkd.kd_loss, temperature=2.0, alpha=0.3),
    Term(fastkd.hint_loss, "body.0", "body.0:output", weight=0.7, adapt="linear"),
    Term(fastkd.gram_loss, "body.2:input", "body", weight=0.1),
]


@pytest.fixture
def _fresh() -> Iterator[None]:
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def outcome(distiller: Distiller, batch: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    distiller.zero_grad()
    loss, parts = distiller.loss(batch)
    loss.backward()
    return loss.detach(), parts, [parameter.grad for parameter in distiller.parameters()]


def compile_both(student: nn.Module, teacher: nn.Module) -> tuple[Any, Any]:
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    return torch.compile(student, **options), torch.compile(teacher, **options)


def compile_in_place(student: nn.Module, teacher: nn.Module) -> tuple[Any, Any]:
    student.compile(backend="eager", fullgraph=True)
    teacher.compile(backend="eager", fullgraph=True)
    return student, teacher


def compile_blocks(student: Any, teacher: Any) -> tuple[Any, Any]:
    student.body[0] = torch.compile(student.body[0], backend="eager", fullgraph=True)
    teacher.body = torch.compile(teacher.body, backend="eager", fullgraph=True)
    return student, teacher


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("make", [compile_both, compile_in_place, compile_blocks])
def test_compiled_models(make: Any) -> None:
    student, teacher, batch = Net(6, dropout=0.0), Net(9), vectors()
    plain = Distiller(student, teacher, TERMS).prepare(batch)
    twins = make(copy.deepcopy(student), copy.deepcopy(teacher))
    compiled = Distiller(*twins, TERMS)
    compiled.adapters = copy.deepcopy(plain.adapters)
    for _ in range(2):
        torch.testing.assert_close(outcome(compiled, batch), outcome(plain, batch))
        # Without a loss in between, as in a validation: no hook may be forgotten, nor a value remembered.
        compiled.student(batch[0])
        plain.student(batch[0])
        batch = vectors()
    assert all(tap.value is None for capture in compiled._captures.values() for tap in capture._taps.values())
    compiled.detach()
    assert hooks(compiled.student) == hooks(compiled.teachers["teacher"].model) == 0
    torch.testing.assert_close(compiled.student(batch[0]), plain.student(batch[0]))


@pytest.mark.usefixtures("_fresh")
def test_a_graph_that_is_older_than_the_hooks() -> None:
    model = torch.compile(Net(4).eval(), backend="eager")
    x = torch.randn(2, 8)
    model(x)
    with pytest.raises(RuntimeError, match=r"'head' was not called .* call torch._dynamo.reset\(\)"):
        Capture(model, ["head"])(x)
    torch._dynamo.reset()
    assert Capture(model, ["head"])(x)["head"].shape == (2, 5)


@pytest.mark.usefixtures("_fresh")
def test_models_of_one_class_have_their_own_hooks() -> None:
    """A graph of one is used for another whose shapes are the same, unless it looks at the hooks."""
    models = [Net(4).eval() for _ in range(3)]
    compiled: list[Any] = [torch.compile(model, backend="eager", fullgraph=True) for model in models]
    captures = [Capture(compiled[0], ["head:input"]), Capture(compiled[1], ["head", "body.0"])]
    for _ in range(2):
        x = torch.randn(2, 8)
        for model, call in zip(models, compiled, strict=True):
            torch.testing.assert_close(call(x), model(x))
        torch.testing.assert_close(captures[0](x)["head:input"], models[0].body(x))
        want = {"head": models[1](x), "body.0": models[1].body[0](x)}
        torch.testing.assert_close(captures[1](x), want)


@pytest.mark.usefixtures("_fresh")
def test_hooks_of_a_compiled_model_are_gone_after_an_exception() -> None:
    inside = Net(4).eval()
    model = torch.compile(inside, backend="eager")
    capture = Capture(model, ["body", "head:input"])
    assert hooks(inside) == 2
    x = torch.randn(2, 8)
    capture(x)
    with pytest.raises(Exception, match="reduction dim"):
        capture(torch.randn(2, 3))
    assert hooks(inside) == 0
    for _ in range(2):
        torch.testing.assert_close(capture(x)["head:input"], inside.body(x))


@pytest.mark.usefixtures("_fresh")
def test_the_whole_distiller_compiled() -> None:
    student, teacher, batch = Net(6, dropout=0.0), Net(9), vectors()
    plain = Distiller(student, teacher, TERMS).prepare(batch)
    twin = copy.deepcopy(plain)
    twin.attach()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        loss, parts = compiled(batch)
        loss.backward()
        want, want_parts = plain(batch)
        want.backward()
        torch.testing.assert_close((loss, parts), (want, want_parts))
    got = [parameter.grad for parameter in twin.parameters()]
    torch.testing.assert_close(got, [parameter.grad for parameter in plain.parameters()])


RANK = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    sys.path.append(".")
    from distill_models import Net, hooks
    import fastkd
    from fastkd.distill import Distiller, Term

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y, student, teacher, adapters = torch.load(f"{folder}/all.pt", weights_only=False)
    terms = [
        Term(fastkd.kd_loss, temperature=2.0, alpha=0.3),
        Term(fastkd.hint_loss, "body.0", "body.0", weight=0.7, adapt="linear"),
        Term(fastkd.gram_loss, "body.0", "body.0", weight=0.1, group=dist.group.WORLD),
    ]
    distiller = Distiller(student, teacher, terms).prepare((x, y))
    distiller.adapters.load_state_dict(adapters)
    model = DistributedDataParallel(distiller)
    rows = slice(0, 3) if rank == 0 else slice(3, 8)
    # DistributedDataParallel takes the mean over both. The group's gram_loss is of the whole batch already.
    counts = {"kd_loss": (y != -100).sum() / 2, "hint_loss/body.0": len(y) / 2}
    loss, parts = model((x[rows], y[rows]), normalizer=counts, share=2 * len(y[rows]) / len(y))
    loss.backward()
    assert hooks(distiller) == hooks(teacher) == 0
    gradients = [parameter.grad for parameter in distiller.parameters()]
    torch.save((gradients, parts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    """Different numbers of rows, and of labels, on each."""
    x, y = vectors(8)
    y[1] = y[6] = y[7] = -100
    student, teacher = Net(6, dropout=0.0).eval(), Net(9)  # a BatchNorm that learns would see its own rows only
    terms = [*TERMS[:2], Term(fastkd.gram_loss, "body.0", "body.0", weight=0.1)]
    whole = Distiller(student, teacher, terms).prepare((x, y))
    torch.save([x, y, student, teacher, whole.adapters.state_dict()], tmp_path / "all.pt")
    run_ranks(RANK, tmp_path)
    _, parts, want = outcome(whole, (x, y))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for gradients, own in ranks:
        torch.testing.assert_close(gradients, want)
        torch.testing.assert_close(own["gram_loss/body.0"], parts["gram_loss/body.0"])
    for name in ("kd_loss", "hint_loss/body.0"):
        torch.testing.assert_close(sum(own[name] for _, own in ranks) / 2, parts[name])
