"""What the loop refuses: arguments, streams without a place, runs with other settings, states that are not plain."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_training import SGD, both, network, rows, same
from torch.utils.data import DataLoader, IterableDataset

from fastkd import kd_loss
from fastkd.distill import Distiller, Group, Stage, Term, curves, fit_chain, fit_stages, loop


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "draw", lambda folder: None)  # matplotlib takes a second to import


def test_groups_are_refused() -> None:
    teacher, student = network(8), network(4)
    one = Distiller(student, teacher, [Term(kd_loss)])
    with pytest.raises(ValueError, match="Group: distillers must have the same teachers by the same names, got 'b'"):
        Group({"a": one, "b": Distiller(network(4), network(8), [Term(kd_loss)])})
    with pytest.raises(ValueError, match="Group: distillers must share no parameter, got a, b"):
        Group({"a": one, "b": Distiller(student, teacher, [Term(kd_loss)])})
    with pytest.raises(ValueError, match="Group: distillers must have names without a slash or a dot, got 'a/b'"):
        Group({"a/b": one})
    with pytest.raises(TypeError, match="Group: distillers must be a dict of Distiller by name, got list"):
        Group([one])  # type: ignore[arg-type]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from rows()


class Stateful:
    """A loader that keeps its place, as torchdata's StatefulDataLoader does."""

    dataset = Stream()

    def __init__(self) -> None:
        self.place = self.given = 0

    def __iter__(self) -> Iterator[Any]:
        data, self.place, self.given = rows(), self.given, 0
        while self.place < 24:
            self.place += 6
            yield data[self.place - 6 : self.place]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["place"]


@pytest.mark.parametrize("train", [lambda: DataLoader(Stream(), 6), Stateful])
def test_streams(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = both(), both()
    options = {"steps": 6, "optimizer": SGD, "save_every": 1}
    whole.fit(train(), **options)
    right = loop.Loop._step
    steps = itertools.count()

    def stop(self: Any, group: Any) -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt
        right(self, group)

    monkeypatch.setattr(loop.Loop, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(train(), out=tmp_path, **options)
    if train is Stateful:
        cut.fit(train(), out=tmp_path, resume=True, **options)
        same(whole, cut, rtol=0, atol=0)
    else:
        with pytest.raises(RuntimeError, match="fit: a loader of an IterableDataset cannot go on in the middle"):
            cut.fit(train(), out=tmp_path, resume=True, **options)
        with pytest.raises(ValueError, match="fit: steps must be given for a loader without a length"):
            cut.fit(train(), epochs=1)


def test_what_a_checkpoint_could_not_be_read_with(tmp_path: Path) -> None:
    class Odd(torch.optim.lr_scheduler.ConstantLR):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.odd = [object()]
            super().__init__(optimizer)

    message = r"fit: checkpoint\['scheduler'\]\['odd'\]\[0\] must hold tensors, numbers, .* got object"
    with pytest.raises(TypeError, match=message):
        both().fit(rows(), epochs=1, out=tmp_path, lr_scheduler=Odd)
    assert not list(tmp_path.glob("*.pt*"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, r"fit: epochs must be given, or steps, and not both, got \(None, None\)"),
    ({"epochs": 1, "steps": 1}, r"fit: epochs must be given, or steps, and not both, got \(1, 1\)"),
    ({"epochs": 0}, "fit: epochs must be positive, got 0"),
    ({"epochs": 1, "precision": "int8"}, "fit: precision must be one of bfloat16, float16, got 'int8'"),
    ({"epochs": 1, "resume": "yes"}, "fit: resume must be True, False or \"auto\", got 'yes'"),
    ({"epochs": 1, "resume": True}, "fit: out must be given with resume, got None"),
    ({"epochs": 1, "tensorboard": True}, "fit: out must be given with tensorboard, got None"),
    ({"epochs": 1, "patience": 2}, "fit: patience must have a val or an evaluate to go by, got 2"),
    ({"epochs": 1, "monitor": "loss"}, "fit: monitor must have a val or an evaluate to go by, got loss"),
    ({"epochs": 1, "keep": "best"}, "fit: keep must be \"last\" without a val or an evaluate, got 'best'"),
    ({"epochs": 1, "val": rows(), "monitor": "f1"}, "fit: monitor must be one of 'loss', 'accuracy', .* got 'f1'"),
    ({"epochs": 1, "clip_norm": 0.0}, "fit: clip_norm must be positive and finite in float32, got 0.0"),
    ({"epochs": 1, "train": []}, "fit: train must have a batch of rows, got 0 rows"),
    ({"epochs": 1, "train": Stream()}, "fit: train must be a dataset with a length, or a DataLoader, got Stream"),
    ({"epochs": 1, "optimizer": lambda p: 3}, "fit: optimizer must return an optimizer, got int"),
    ({"epochs": 1, "lr_scheduler": lambda o: 3}, "fit: lr_scheduler must return a scheduler, got int"),
    ({"epochs": 1, "evaluate": lambda s: "good"}, "fit: evaluate must return a number or a dict of numbers, got str"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        both().fit(**{"train": rows(), **options})


def test_runs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fit: out must hold a last.pt to resume from, got .*"):
        both().fit(rows(), epochs=1, out=tmp_path, resume=True)
    both().fit(rows(), epochs=1, out=tmp_path)
    with pytest.raises(ValueError, match=r'fit: out must hold no run \(resume="auto" goes on with it\), got .*'):
        both().fit(rows(), epochs=1, out=tmp_path)
    with pytest.raises(ValueError, match=r"fit: batch_size must be 32, as in the run in .*, got 16"):
        both().fit(rows(), epochs=1, out=tmp_path, resume="auto", batch_size=16)
    with pytest.raises(ValueError, match=r"fit: terms must be \['kd_loss', 'hint_loss/1'\], as in .*"):
        Distiller(network(4), network(8), [Term(kd_loss)]).fit(rows(), epochs=1, out=tmp_path, resume="auto")


@pytest.mark.parametrize("runs", [fit_stages, fit_chain])
def test_a_part_that_is_there_already_is_seen_before_the_first_one_trains(runs: Any, tmp_path: Path) -> None:
    student, teacher, terms = network(4), network(8), [Term(kd_loss)]
    both().fit(rows(), epochs=1, out=tmp_path / "1-student")
    before = copy.deepcopy(student)
    stages = student, teacher, [Stage(terms, name="hint"), Stage(terms, name="student")]
    arguments = stages if runs is fit_stages else ([teacher, student, network(3)], terms)
    with pytest.raises(ValueError, match=rf"^{runs.__name__}: out must hold no run \(resume=.*, got .*1-student$"):
        runs(*arguments, rows(), epochs=1, out=tmp_path)
    same(student, before, rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", ".", "..", " ", "a/b", "a\\b", "/tmp", "c:", "a\0b", "a\nb", 3])
def test_names_of_stages_that_name_no_folder(name: Any) -> None:
    with pytest.raises(ValueError, match=r"Stage: name must be the name of a folder, without / : \\, got "):
        Stage([Term(kd_loss)], name=name)
    assert Stage([Term(kd_loss)], name="hint 1.5_ä").name
