"""What a run that ends with an error leaves behind, and what the next one in its place makes of that."""

from __future__ import annotations

import csv
import gc
import math
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from fastkd import cross_entropy, hint_loss, kd_loss
from fastkd.distill import Distiller, Group, Piecewise, Stage, Term, checkpoint, curves, fit_stages

ROWS = TensorDataset(torch.arange(96.0).sin().view(24, 4), torch.arange(24) % 3)
OPTIONS: dict[str, Any] = {"batch_size": 5, "optimizer": partial(torch.optim.SGD, lr=0.1)}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "draw", lambda folder: None)


def distiller(*terms: Term) -> Distiller:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return Distiller(student, teacher, terms or [Term(kd_loss)])


def breaks_at(one: Distiller, backward: int, value: float | None = None) -> Any:
    """The gradient of that backward, counted from 1, is this number; or Ctrl-C is pressed there."""
    calls = [0]

    def change(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] != backward:
            return gradient
        if value is None:
            raise KeyboardInterrupt
        return torch.full_like(gradient, value)

    return one.student.bias.register_hook(change)


def test_gradients_of_an_interrupted_step_are_forgotten(tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 3, "accumulate": 2, "save_every": 2}
    whole, cut = distiller(), distiller()
    whole.fit(ROWS, **options)
    handle = breaks_at(cut, 7)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(ROWS, out=tmp_path, **options)
    handle.remove()
    assert cut.student.weight.grad is not None
    cut.fit(ROWS, out=tmp_path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_a_gradient_that_is_nan_reaches_no_weight_and_no_checkpoint(tmp_path: Path) -> None:
    one = distiller()
    breaks_at(one, 3, math.nan)
    with pytest.raises(FloatingPointError, match="fit: the gradient is NaN at step 2, and the loss is not"):
        one.fit(ROWS, epochs=1, out=tmp_path, save_every=1, log_every=10, **OPTIONS)
    assert all(torch.isfinite(parameter).all() for parameter in one.parameters())
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["place"][0] == 2
    assert torch.isfinite(state["distiller"]["student.bias"]).all()


def test_gradients_that_no_optimizer_holds_do_not_add_up(tmp_path: Path) -> None:
    one = distiller()
    optimizer = torch.optim.SGD([one.student.weight], lr=0.0)
    one.fit(ROWS, epochs=4, out=tmp_path, log_every=1, batch_size=24, optimizer=optimizer)
    rows = (tmp_path / "train.csv").read_text().splitlines()
    column = rows[0].split(",").index("grad_norm")
    norms = [float(row.split(",")[column]) for row in rows[1:]]
    assert norms == pytest.approx(norms[:1] * 4)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, save, calls = distiller(), torch.save, [0]

    def full(state: Any, file: Any) -> None:
        calls[0] += 1
        if calls[0] < 3:
            return save(state, file)
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        one.fit(ROWS, epochs=1, out=tmp_path, save_every=1, **OPTIONS)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last.pt")["place"][0] == 2
    assert not list(tmp_path.glob(f"*{checkpoint.TEMPORARY}")), "the half of a file takes no place"


def test_columns_of_a_run_without_a_checkpoint_are_forgotten(tmp_path: Path) -> None:
    def fails(student: nn.Module) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        distiller().fit(ROWS, epochs=1, out=tmp_path, evaluate=fails, log_every=1, **OPTIONS)
    other = distiller(Term(kd_loss, name="soft"), Term(cross_entropy, name="hard"))
    other.fit(ROWS, epochs=1, out=tmp_path, log_every=1, **OPTIONS)
    header, *rows = (tmp_path / "train.csv").read_text().splitlines()
    assert "term/soft,term/hard" in header
    assert len(rows) == 5


def test_a_run_goes_on_with_other_columns(tmp_path: Path) -> None:
    distiller().fit(ROWS, epochs=1, out=tmp_path, log_every=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"fit: terms must have the columns of train.csv: .*, got \['temperature/kd_l"):
        distiller(Term(kd_loss, temperature=2.0)).fit(ROWS, epochs=2, out=tmp_path, log_every=1, resume=True, **OPTIONS)


def test_a_term_that_is_evaluated_later(tmp_path: Path) -> None:
    hint = Term(hint_loss, "", "2", weight=Piecewise({0: 0.0, 0.5: 1.0}), name="late")
    distiller(Term(kd_loss), hint).fit(ROWS, ROWS, epochs=2, out=tmp_path, **OPTIONS)
    header, *rows = ((line.split(",")) for line in (tmp_path / "val.csv").read_text().splitlines())
    column = header.index("term/late")
    assert [row[column] == "" for row in rows] == [True, False]


def noisy(rows: list[Any]) -> Any:
    inputs, labels = default_collate(rows)
    return inputs + torch.randn(inputs.shape), labels


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_fn_draws_the_same_numbers_again(workers: int, tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 2, "save_every": 2, "collate_fn": noisy}
    whole, cut = distiller(), distiller()
    whole.fit(ROWS, **options)
    breaks_at(cut, 8)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(ROWS, out=tmp_path, num_workers=workers, **options)
    torch.manual_seed(77)
    cut.fit(ROWS, out=tmp_path, resume=True, num_workers=workers, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_workers_end_with_the_run() -> None:
    gc.collect()
    gc.disable()
    before = set(multiprocessing.active_children())
    try:
        distiller().fit(ROWS, epochs=2, num_workers=1, **OPTIONS)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


EVALUATES: list[tuple[Any, str]] = [
    ({}, "fit: evaluate must return a metric, got none"),
    ({"step": 1.0}, "fit: evaluate must return metrics with other names than step and epoch, got 'step'"),
    ({"f1": "good"}, "fit: evaluate must return a number or a dict of numbers, got str"),
    (None, "fit: evaluate must return a number or a dict of numbers, got NoneType"),
]


@pytest.mark.parametrize(("metrics", "message"), EVALUATES)
def test_what_a_function_may_not_return(metrics: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        distiller().fit(ROWS, epochs=1, evaluate=lambda student: metrics, **OPTIONS)


@pytest.mark.parametrize("evaluate", [3, {"f1": 3}])
def test_what_is_no_function(evaluate: Any) -> None:
    with pytest.raises(TypeError, match="fit: evaluate must be a function of the student, or a dict of them, got int"):
        distiller().fit(ROWS, epochs=1, evaluate=evaluate)


def test_names_that_modules_cannot_have() -> None:
    with pytest.raises(ValueError, match="Distiller: terms must have names that ModuleDict leaves free, got 'keys'"):
        distiller(Term(kd_loss, name="keys", adapt=nn.Identity()))
    with pytest.raises(ValueError, match="Group: distillers must have names that ModuleDict leaves free, got 'items'"):
        Group({"items": distiller()})


def test_one_stage_is_no_list() -> None:
    with pytest.raises(TypeError, match="fit_stages: stages must be a list of Stage, got one"):
        fit_stages(nn.Linear(4, 3), nn.Linear(4, 3), Stage([Term(kd_loss)]), ROWS, epochs=1)  # type: ignore[arg-type]


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    result = distiller().fit(ROWS, epochs=1, evaluate={"f1": lambda student: numpy.float32(0.5)}, **OPTIONS)
    assert result.metrics == {"f1": 0.5}


def test_evaluation_draws_the_same_numbers_each_time(tmp_path: Path) -> None:
    options = {"optimizer": partial(torch.optim.SGD, lr=0.0), "collate_fn": noisy, "num_workers": 1}
    distiller().fit(ROWS, ROWS, epochs=2, out=tmp_path, **options)
    first, second = ((line.split(",")[2:]) for line in (tmp_path / "val.csv").read_text().splitlines()[1:])
    assert first == second


def test_two_who_write_one_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"

    def write(file: Any) -> None:
        file.write(b"first ")
        checkpoint.replace(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b"run")

    checkpoint.replace(path, write)
    assert path.read_bytes() == b"first run"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint(content: bytes | None, tmp_path: Path) -> None:
    if content is None:
        torch.save([1], tmp_path / "last.pt")
    else:
        (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"fit: out must hold checkpoints that fit has written, got .*last.pt"):
        distiller().fit(ROWS, epochs=1, out=tmp_path, resume="auto", **OPTIONS)


def test_schedulers_that_would_do_nothing() -> None:
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), 1)
    with pytest.raises(ValueError, match=r"fit: lr_scheduler must be made for the optimizer .*, got StepLR of another"):
        distiller().fit(ROWS, epochs=1, lr_scheduler=other, **OPTIONS)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match="fit: lr_scheduler must have a val or an evaluate to go by, got ReduceLROn"):
        distiller().fit(ROWS, epochs=1, lr_scheduler=plateau, **OPTIONS)


def test_accuracy_of_logits_in_a_dict() -> None:
    class Named(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> Any:
            return {"logits": super().forward(inputs)}

    one = Distiller(Named(4, 3), nn.Linear(4, 3), [Term(kd_loss)])
    assert "accuracy" in one.fit(ROWS, ROWS, epochs=1, **OPTIONS).metrics


def test_schedules_move_in_steps_without_a_term() -> None:
    rates, made = [], []
    one = distiller(Term(kd_loss, weight=Piecewise({0: 0.0, 3: 1.0})))

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        made.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
        optimizer.register_step_post_hook(lambda taken, *_: rates.append(taken.param_groups[0]["lr"]))
        return made[0]

    one.fit(ROWS, steps=5, lr_scheduler=scheduler, **OPTIONS)
    assert made[0].last_epoch == 5
    assert rates == pytest.approx([0.1 / step for step in (1, 2, 3, 4, 5)])


def test_evaluation_while_no_term_counts(tmp_path: Path) -> None:
    """As training has it before a schedule begins: the loss is no number, and what comes later is better."""
    one = distiller(Term(kd_loss, weight=Piecewise({0: 0.0, 3: 1.0}), name="soft"))
    result = one.fit(ROWS, ROWS, steps=5, evaluate_every=1, out=tmp_path, keep="best", **OPTIONS)
    with open(tmp_path / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows[:3]] == ["nan"] * 3
    assert [row["term/soft"] for row in rows[:3]] == [""] * 3
    assert len({row["accuracy"] for row in rows[:3]}) == 1, "the student runs, and learns nothing"
    assert all(float(row["loss"]) == float(row["term/soft"]) for row in rows[3:])
    assert result.best_step == 5
    with pytest.raises(ValueError, match="fit: val must have a batch, got none"):
        distiller().fit(ROWS, [], epochs=1, **OPTIONS)


def test_a_last_batch_of_one_row() -> None:
    """BatchNorm has no statistics of it; where it needs none, it is a batch like any other."""
    teacher, options = nn.Linear(4, 3), {**OPTIONS, "epochs": 1, "batch_size": 23}
    flat = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"^fit: train must give BatchNorm more than one row \(drop_last=.*, got 1$"):
        Distiller(flat, teacher, [Term(kd_loss)]).fit(ROWS, **options)
    assert Distiller(flat, teacher, [Term(kd_loss)]).fit(ROWS, drop_last=True, **options).step == 1
    flat.register_forward_pre_hook(lambda _, inputs: inputs[0][:1])
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel"):
        Distiller(flat, teacher, [Term(kd_loss)]).fit(ROWS, **options)
    wide = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(4, 3))
    assert Distiller(wide, teacher, [Term(kd_loss)]).fit(ROWS, **options).step == 2
    single = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.InstanceNorm1d(4), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"^Expected more than 1 spatial element"):
        Distiller(single, teacher, [Term(kd_loss)]).fit(ROWS, **{**options, "batch_size": 1})


def test_nobody_is_told_that_weights_are_the_best_where_none_were() -> None:
    with pytest.warns(UserWarning, match="score was NaN in every evaluation, so none was the best: the student keeps"):
        result = distiller().fit(ROWS, epochs=2, evaluate={"score": lambda _: math.nan}, keep="best", **OPTIONS)
    assert (result.best_step, result.step) == (None, 10)
