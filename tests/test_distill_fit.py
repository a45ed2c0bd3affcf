"""The loop: what a step is made of, and what is evaluated, kept and written."""

from __future__ import annotations

import copy
import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_training import SGD, both, csv_rows, network, rows, same
from torch import nn
from torch.utils.data import DataLoader

from fastkd import cross_entropy, hint_loss, kd_loss
from fastkd.distill import Cosine, Distiller, Group, Linear, Stage, Term, curves, fit_chain, fit_stages, loop
from fastkd.distill.best import Best
from fastkd.distill.evaluation import evaluate
from fastkd.distill.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "draw", lambda folder: None)  # matplotlib takes a second to import


def test_it_is_the_loop_that_everyone_writes() -> None:
    data, one = rows(), both()
    other = copy.deepcopy(one)
    one.fit(data, steps=5, batch_size=24, shuffle=False, optimizer=SGD, clip_norm=0.3)
    optimizer = SGD(other.parameters())
    for _ in range(5):
        loss, _ = other.loss(data[:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        optimizer.step()
    same(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"alpha": 0.9}])
def test_accumulated_batches_are_one_batch(options: dict[str, Any]) -> None:
    """Although one has fewer labels that count than another; sizes of 24 rows in 10, 10 and 4."""
    one = both(**options)
    other = copy.deepcopy(one)
    one.fit(rows(), epochs=3, batch_size=24, optimizer=SGD)
    other.fit(rows(), epochs=3, batch_size=10, accumulate=3, optimizer=SGD)
    same(one, other, rtol=1e-5, atol=1e-6)


def test_a_mean_of_means_would_not_be_that() -> None:
    one = both()
    loss, _ = one.loss(rows()[:])
    means = [one.loss(rows()[begin:end])[0] for begin, end in ((0, 10), (10, 20), (20, 24))]
    assert not math.isclose(loss.item(), sum(mean.item() for mean in means) / 3, rel_tol=1e-3)


def test_a_group_is_its_students_one_by_one() -> None:
    teacher, widths = network(8, seed=9), (4, 5)

    def distillers() -> dict[str, Distiller]:
        terms = [[Term(kd_loss, temperature=2.0)], [Term(kd_loss), Term(hint_loss, "1", "1", adapt="linear")]]
        return {f"s{w}": Distiller(network(w), teacher, some) for w, some in zip(widths, terms, strict=True)}

    options = {"epochs": 2, "batch_size": 10, "accumulate": 2, "optimizer": SGD, "clip_norm": 0.2}
    torch.manual_seed(3)
    alone = distillers()
    for one in alone.values():
        one.prepare((torch.zeros(1, 6), None))
    group = Group(distillers())
    for name, one in group.members.items():
        one.prepare((torch.zeros(1, 6), None))
        one.load_state_dict(alone[name].state_dict())
    for one in alone.values():
        one.fit(rows(), **options)
    result = group.fit(rows(), rows(9, seed=2), **options)
    for name, one in alone.items():
        same(one, group.members[name], rtol=1e-5, atol=1e-6)
    assert {"loss", "s4/accuracy", "s5/accuracy", "term/s5/hint_loss/1"} <= result.metrics.keys()


def test_the_teacher_of_a_group_runs_once_a_batch() -> None:
    teacher, calls = network(8, seed=9), []
    group = Group({name: Distiller(network(4), teacher, [Term(kd_loss)]) for name in "ab"})
    teacher.register_forward_hook(lambda *_: calls.append(1))
    group.loss(rows()[:])
    assert len(calls) == 1


@pytest.mark.parametrize("size", [24, 7, 1])
def test_evaluation_does_not_depend_on_the_size_of_batches(size: int) -> None:
    distiller = both(weight=0.5)
    loss, parts = distiller.loss(rows()[:])
    found = evaluate(distiller, DataLoader(rows(), size), None, Precision(None, CPU), CPU)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["term/kd_loss"] == pytest.approx(parts["kd_loss"].item(), rel=1e-6)
    inputs, labels = rows()[:]
    known = labels != -100
    right = distiller.student(inputs).argmax(1)[known] == labels[known]
    assert found["accuracy"] == pytest.approx(right.double().mean().item())


def test_functions_evaluate_the_student_as_it_will_be_used() -> None:
    student = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    seen = []

    def score(model: nn.Module) -> float:
        seen.append((model is student, model.training, model[1].training, torch.is_grad_enabled()))
        return 2.0

    functions = {"a": score, "b": lambda _: {"c": 1}}
    result = Distiller(student, network(8), [Term(kd_loss)]).fit(rows(), epochs=2, evaluate=functions)
    assert seen == [(True, False, False, False)] * 2
    assert result.metrics == {"a": 2.0, "b/c": 1.0}
    assert student.training


def test_what_is_frozen_stays_in_evaluation_mode() -> None:
    student = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 3)).eval()
    student[0].requires_grad_(False)
    modes = []
    student.register_forward_pre_hook(lambda model, _: modes.append([m.training for m in model.modules()]))
    before = copy.deepcopy(student[0].state_dict())
    Distiller(student, network(8), [Term(kd_loss)]).fit(rows(), steps=2)
    assert modes == [[True, False, False, False, False, True]] * 2
    assert not any(module.training for module in student.modules()), "as it was"
    assert all(torch.equal(value, before[name]) for name, value in student[0].state_dict().items())


def test_early_stopping_and_the_best_weights(tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 2.5, math.nan, 1.95, 1.0])
    weights = []

    def score(model: nn.Module) -> float:
        weights.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    for out in (None, tmp_path):
        distiller = both()
        options = {"epochs": 9, "evaluate": {"score": score}, "patience": 3, "min_delta": 0.1, "keep": "best"}
        result = distiller.fit(rows(), batch_size=12, out=out, **options)
        assert (result.stopped_early, result.step, result.best_step, result.best) == (True, 10, 10, {"score": 1.95})
        assert all(torch.equal(weights[4][name], value) for name, value in distiller.student.state_dict().items())
        scores, weights[:] = iter([3.0, 2.0, 2.5, math.nan, 1.95, 1.0]), []
    assert result.best_checkpoint is not None
    assert result.last_checkpoint is not None
    assert torch.load(result.last_checkpoint, weights_only=True)["place"][0] == 10
    best = torch.load(result.best_checkpoint, weights_only=True)
    assert best["step"] == 10
    network(4).load_state_dict(best["student"])


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_patience_begins_anew(mode: str, sign: int) -> None:
    best = Best("score", mode, patience=2, min_delta=0.5)
    seen = []
    for step, score in enumerate([3.0, 2.8, 2.4, 2.3, math.nan], start=1):
        better = best.update(step, {"score": sign * score})
        seen.append((better, best.waited, best.exhausted))
    assert seen == [(True, 0, False), (True, 1, False), (True, 0, False), (True, 1, False), (False, 2, True)]
    assert (best.step, best.metrics) == (4, {"score": sign * 2.3})


def test_a_longer_run_goes_on_where_the_short_one_ended(tmp_path: Path) -> None:
    options = {"batch_size": 10, "optimizer": SGD, "log_every": 1}
    distiller, other = both(), both()
    assert distiller.fit(rows(), epochs=1, out=tmp_path, **options).step == 3
    (tmp_path / "train.csv.unfinished").write_text("killed while it was cut back")
    assert distiller.fit(rows(), epochs=3, out=tmp_path, resume=True, **options).step == 9
    assert not list(tmp_path.glob("*.unfinished"))
    other.fit(rows(), epochs=3, **options)
    same(distiller, other, rtol=0, atol=0)
    assert [int(row["step"]) for row in csv_rows(tmp_path / "train.csv")] == list(range(1, 10))


def test_the_rows_that_are_logged(tmp_path: Path) -> None:
    student, teacher = network(4), network(8, seed=9)
    terms = [Term(kd_loss, temperature=Linear(4.0, 2.0)), Term(hint_loss, "1", "1", weight=Cosine(1.0, 0.0, until=2))]
    terms[1].adapt = "linear"
    options = {"lr_scheduler": Linear(1.0, 0.0), "optimizer": SGD, "shuffle": False, "batch_size": 24}
    distiller = Distiller(student, teacher, terms)
    distiller.fit(rows(), rows(6), steps=4, log_every=2, evaluate_every=3, out=tmp_path, **options)
    train, val = csv_rows(tmp_path / "train.csv"), csv_rows(tmp_path / "val.csv")
    assert [row["step"] for row in train] == ["2", "4"]
    assert [row["step"] for row in val] == ["3", "4"]
    assert [float(row["lr"]) for row in train] == pytest.approx([0.075, 0.025])
    assert [float(row["temperature/kd_loss"]) for row in train] == [3.5, 2.5]
    assert [float(row["weight/hint_loss/1"]) for row in train] == [0.5, 0.0]
    assert [row["term/hint_loss/1"] == "" for row in train] == [False, True]
    first = train[0]
    total = float(first["term/kd_loss"]) + 0.5 * float(first["term/hint_loss/1"])
    assert float(first["loss"]) == pytest.approx(total, rel=1e-6)
    assert float(first["grad_norm"]) > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [("train", 2), ("val", 3), ("train", 4), ("val", 4)]
    assert lines[0]["loss"] == float(first["loss"])


@pytest.mark.parametrize("device_waits", [False, True])
def test_nan_names_its_term_and_leaves_the_weights(
    device_waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def breaks(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student - teacher).mean() * (math.nan if next(calls) == 3 else 1.0)

    distiller = Distiller(network(4), network(8), [Term(kd_loss), Term(breaks, name="mine")])
    if device_waits:  # as on a GPU: it is seen at the step that is logged, and no checkpoint holds it
        monkeypatch.setattr(loop, "Watch", lambda device: _waiting(device))
    with pytest.raises(FloatingPointError, match="fit: term 'mine' is NaN at step 3"):
        distiller.fit(rows(), steps=9, batch_size=24, out=tmp_path, log_every=6, save_every=5)
    if device_waits:
        assert not (tmp_path / "last.pt").exists()
    else:
        assert all(torch.isfinite(parameter).all() for parameter in distiller.parameters())


def _waiting(device: torch.device) -> Any:
    from fastkd.distill.finite import Watch

    watch = Watch(device)
    watch.waits = True
    return watch


def test_a_gradient_that_is_nan(tmp_path: Path) -> None:
    def steep(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student * 0).sum().sqrt()  # the slope of a root at 0, times 0

    distiller = Distiller(network(4), network(8), [Term(steep)])
    with pytest.raises(FloatingPointError, match="fit: the gradient is NaN at step 0, and the loss is not"):
        distiller.fit(rows(), steps=9, clip_norm=1.0)
    assert all(torch.isfinite(parameter).all() for parameter in distiller.parameters())


def test_a_step_without_a_term_does_nothing() -> None:
    distiller = both()
    before = copy.deepcopy(distiller.state_dict())
    for term in distiller.terms:
        term.weight = 0.0
    distiller.fit(rows(), steps=2, precision="float16", log_every=1, clip_norm=1.0)
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())


def test_stages_train_what_they_say(tmp_path: Path) -> None:
    student, teacher = network(4), network(8, seed=9)
    before = copy.deepcopy(student.state_dict())
    hint = Stage([Term(hint_loss, "1", "1", adapt="linear")], trainable=["0.*"], epochs=2, name="hint")
    seen = []

    def score(model: nn.Module) -> float:
        seen.append([name for name, value in model.state_dict().items() if not torch.equal(value, before[name])])
        return 0.0

    results = fit_stages(
        student, teacher, [hint, Stage([Term(kd_loss)], epochs=1)], rows(), out=tmp_path, evaluate={"score": score}
    )
    assert seen == [["0.weight", "0.bias"]] * 2 + [list(before)]
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert [result.folder for result in results] == [tmp_path / "0-hint", tmp_path / "1-stage"]
    with pytest.raises(ValueError, match=r"Stage: trainable must match parameters of the student, such as .*'0.bias'"):
        fit_stages(student, teacher, [Stage([Term(kd_loss)], trainable=["0,*"], epochs=1)], rows())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_chain_is_one_after_the_other() -> None:
    big, mid, small = network(8, seed=9), network(6), network(4)
    other_mid, other_small = copy.deepcopy(mid), copy.deepcopy(small)
    options = {"epochs": 2, "optimizer": SGD}
    fit_chain([big, mid, small], [Term(kd_loss, temperature=2.0)], rows(), **options)
    Distiller(other_mid, big, [Term(kd_loss, temperature=2.0)]).fit(rows(), **options)
    Distiller(other_small, other_mid, [Term(kd_loss, temperature=2.0)]).fit(rows(), **options)
    same(mid, other_mid, rtol=0, atol=0)
    same(small, other_small, rtol=0, atol=0)


def test_bfloat16_and_no_teacher() -> None:
    dtypes = []
    student = network(4)
    student[2].register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    Distiller(student, None, [Term(cross_entropy)]).fit(rows(), steps=1, precision="bfloat16")
    assert dtypes == [torch.bfloat16]
    assert student[0].weight.dtype == torch.float32


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both().fit(rows(), rows(6), steps=2, log_every=1, out=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert "val/accuracy" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2) for _ in range(2)],
            milestones=[2],
        ),
    ],
)
def test_schedulers_go_on(make: Any, tmp_path: Path) -> None:
    options = {"batch_size": 8, "lr_scheduler": make, "log_every": 1}
    cut, whole = both(), both()
    cut.fit(rows(), epochs=1, out=tmp_path / "cut", **options)
    cut.fit(rows(), epochs=3, out=tmp_path / "cut", resume=True, **options)
    whole.fit(rows(), epochs=3, out=tmp_path / "whole", **options)
    same(whole, cut, rtol=0, atol=0)
    rates = [[row["lr"] for row in csv_rows(tmp_path / which / "train.csv")] for which in ("cut", "whole")]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 4
