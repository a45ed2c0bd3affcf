"""Runs of training that end in the middle: each in a process of its own, which kills itself at a named place."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastkd import hint_loss, kd_loss
from fastkd.distill import (
    Cosine,
    Distiller,
    Group,
    Linear,
    Stage,
    Term,
    checkpoint,
    curves,
    fit_chain,
    fit_stages,
    loop,
    metrics,
    records,
)

TIMES = ("rows_per_second",)  # the one number of a row that differs from run to run


def network(width: int) -> nn.Sequential:
    inner = nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, width)
    return nn.Sequential(*inner, nn.Linear(width, 3))


class Augmented(Dataset[Any]):
    """Rows with noise from all three generators."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(rows, 6, generator=generator)
        self.labels = torch.randint(3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return self.inputs[index] + 0.1 * noise, self.labels[index]


TRAIN, VAL = (
    Augmented(38),
    TensorDataset(Augmented(20).inputs, Augmented(20).labels),
)


def terms() -> list[Term]:
    return [
        Term(kd_loss, temperature=Linear(4.0, 1.0), alpha=0.5),
        Term(hint_loss, "2", "2", adapt="linear", weight=Cosine(1.0, 0.1)),
    ]


def models(*widths: int) -> list[nn.Module]:
    torch.manual_seed(3)
    return [network(width) for width in widths]


def one_run(out: Path, train: Any = TRAIN, **options: Any) -> list[nn.Module]:
    teacher, student = models(8, 5)
    distiller = Distiller(student, teacher, terms())
    chosen = {
        "epochs": 2,
        "batch_size": 4,
        "save_every": 3,
        "log_every": 1,
        "lr_scheduler": Cosine(1.0, 0.0),
        **options,
    }
    distiller.fit(train, VAL, out=out, resume="auto", **chosen)
    return [distiller]


def loader(out: Path, **options: Any) -> list[nn.Module]:
    return one_run(out, DataLoader(TRAIN, 4, shuffle=True), save_every=2)


def loader_with_generator(out: Path) -> list[nn.Module]:
    return one_run(out, DataLoader(TRAIN, 4, shuffle=True, generator=torch.Generator().manual_seed(9)), save_every=2)


def plateau(out: Path) -> list[nn.Module]:
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
    best = {"monitor": "accuracy", "mode": "max", "patience": 6, "evaluate_every": 2, "keep": "best"}
    return one_run(out, lr_scheduler=scheduler, epochs=9, **best)


def stages(out: Path) -> list[nn.Module]:
    teacher, student = models(8, 5)
    hint, kd = (Stage([term], epochs=1) for term in reversed(terms()))
    hint = Stage(hint.terms, trainable=["0.*", "1.*"], epochs=1, name="hint")
    fit_stages(student, teacher, [hint, kd], TRAIN, out=out, resume="auto", batch_size=8, save_every=2, log_every=1)
    return [student]


def chain(out: Path) -> list[nn.Module]:
    big, *students = models(8, 6, 4)
    options = {"epochs": 1, "batch_size": 8, "save_every": 2, "log_every": 1}
    fit_chain([big, *students], terms(), TRAIN, out=out, resume="auto", **options)
    return students


def group(out: Path) -> list[nn.Module]:
    teacher, *students = models(8, 6, 4)
    both = Group({name: Distiller(one, teacher, terms()) for name, one in zip("ab", students, strict=True)})
    both.fit(TRAIN, VAL, out=out, resume="auto", epochs=1, batch_size=8, save_every=2, log_every=1, clip_norm=0.5)
    return [both]


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
RUNS: dict[str, Callable[[Path], list[nn.Module]]] = {
    "plain": one_run,
    "accumulated": partial(one_run, accumulate=2, clip_norm=0.5, optimizer=SGD),
    "saving every step": partial(one_run, accumulate=2, save_every=1, epochs=1),
    "worker": partial(one_run, num_workers=1),
    "bfloat16": partial(one_run, precision="bfloat16"),
    "float16": partial(one_run, precision="float16"),
    "loader": loader,
    "loader with generator": loader_with_generator,
    "plateau": plateau,
    "stages": stages,
    "chain": chain,
    "group": group,
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """That function, which is the last thing that happens when it is called for the n-th time."""
    calls = [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        calls[0] += 1
        if calls[0] == times:
            die()
        return result

    return counted


def kill_after_steps(times: int) -> None:
    loop.Loop._step = after(loop.Loop._step, times)


def kill_within_checkpoint(times: int) -> None:
    """When half of it is in the file."""
    whole, calls = torch.save, [0]

    def half(state: Any, file: Any, **options: Any) -> None:
        begin = file.tell()
        whole(state, file, **options)
        calls[0] += not options  # which a tensor has that is sent to another rank
        if calls[0] == times:
            file.truncate(begin + (file.tell() - begin) // 2)
            file.flush()
            die()

    torch.save = half


def kill_before_rename(times: int) -> None:
    rename, calls = os.replace, [0]

    def last(*paths: Any) -> None:
        calls[0] += 1
        if calls[0] == times:
            die()
        rename(*paths)

    os.replace = last


def kill_after_rename(times: int) -> None:
    os.replace = after(os.replace, times)


def kill_within_metrics(times: int) -> None:
    """When half of a line is in the file."""
    whole, calls = metrics._append, [0]

    def half(path: Path, text: str) -> None:
        calls[0] += 1
        whole(path, text if calls[0] < times else text[: len(text) // 2])
        if calls[0] == times:
            die()

    metrics._append = half


def kill_before_best(times: int) -> None:
    """Between last.pt and the best.pt that belongs to it."""
    honest, calls = records.Records._write_best, [0]

    def never(self: Any, state: Any) -> None:
        calls[0] += 1
        if calls[0] == times:
            die()
        honest(self, state)

    records.Records._write_best = never


KILLS = {name: value for name, value in list(globals().items()) if name.startswith("kill_")}


def digest(modules: list[nn.Module]) -> str:
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def files(out: Path) -> dict[str, Any]:
    """What a run left: its metrics without times, and what is in its checkpoints."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                rows = [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]
            found[name] = rows
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        elif path.suffix == ".pt":
            found[name] = repr_of(checkpoint.load(path))
        elif path.is_file():
            found[name] = None
    return found


def repr_of(value: Any) -> Any:
    """Every bit of it, short."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]
    if isinstance(value, dict):
        return {str(key): repr_of(item) for key, item in value.items()}
    return [repr_of(item) for item in value] if isinstance(value, (list, tuple)) else value


def started(work: Callable[[], Any]) -> int:
    """The number of a copy of this process that does this work."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return process


def ended(process: int) -> int:
    """The status with which it ends."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def attempt(run: str, out: Path, kill: str | None = None, times: int = 0) -> int:
    def work() -> None:
        random.seed(5)  # forks get another one
        if kill is not None:
            KILLS[kill](times)
        report = {"weights": digest(RUNS[run](out)), "files": files(out)}
        out.with_suffix(".json").write_text(json.dumps(report))

    return ended(started(work))


def main(folder: Path) -> None:
    """Reads cases as [run, kill, times] from standard input, a line each, and says how they ended."""
    torch.set_num_threads(1)
    curves.draw = lambda folder: None  # importing matplotlib takes longer than all the rest
    group(folder / "imports")  # what torch imports when it is first used, once for all forks
    for number, line in enumerate(sys.stdin):
        run, kill, times = json.loads(line)
        whole = folder / f"{run}-whole"
        if not whole.with_suffix(".json").exists():
            assert attempt(run, whole) == 0, run
        out = folder / f"{number}"
        statuses = [attempt(run, out, kill, times)]
        while statuses[-1] == -signal.SIGKILL and len(statuses) < 40:
            again = (kill, times) if run == "saving every step" else ()
            statuses.append(attempt(run, out, *again))
        print(json.dumps({"case": [run, kill, times], "statuses": statuses, "out": str(out), "whole": str(whole)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
