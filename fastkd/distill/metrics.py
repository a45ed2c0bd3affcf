"""The numbers of a run, as CSV, JSON lines and TensorBoard events."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import _checks
from . import checkpoint

TRAIN, VAL = "train", "val"
LINES = "metrics.jsonl"
Row = Mapping[str, float | None]


class Metrics:
    """Writes a row at a time: ``train.csv`` and ``val.csv``, and both as lines of ``metrics.jsonl``.

    Args:
        folder: Where; None writes nothing.
        train, val: Rows of later steps, and what was cut off in the middle of a line, are left out of the files: a run
            that goes on after this step writes them anew.
        tensorboard: Events for TensorBoard too.
    """

    def __init__(self, folder: Path | None, train: int, val: int, tensorboard: bool) -> None:
        self.folder = folder
        self.headers: dict[str, list[str]] = {}
        self.events: Any = None
        if folder is None:
            return
        limits = {TRAIN: train, VAL: val}
        for kind, limit in limits.items():
            self._cut(folder / f"{kind}.csv", lambda line, limit=limit: _in_csv(line, limit))  # type: ignore[misc]
            self._read_header(folder, kind)
        self._cut(folder / LINES, lambda line: _in_json(line, limits))
        if tensorboard:
            self.events = _summary_writer()(str(folder / "tensorboard"), purge_step=max(limits.values()) + 1)

    def train(self, row: Row) -> None:
        self._write(TRAIN, row)

    def val(self, row: Row) -> None:
        self._write(VAL, row)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def _write(self, kind: str, row: Row) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{kind}.csv"
        if kind not in self.headers:
            self.headers[kind] = list(row)
            _append(path, _csv_line(row))
        new = [name for name in row if name not in self.headers[kind]]
        if new:
            argument = "terms" if kind == TRAIN else "evaluate"
            _checks.bad_value("fit", argument, f"have the columns of {path.name}: {self.headers[kind]}", new)
        _append(path, _csv_line(["" if (v := row.get(name)) is None else v for name in self.headers[kind]]))
        numbers = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
        _append(self.folder / LINES, json.dumps({"event": kind, **numbers}) + "\n")
        if self.events is not None:
            for name, value in row.items():
                if value is not None and name not in ("step", "epoch"):
                    self.events.add_scalar(f"{kind}/{name}", value, row["step"])
            self.events.flush()

    def _cut(self, path: Path, keep: Callable[[str], bool]) -> None:
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and keep(line)]
        if whole != lines:
            checkpoint.replace(path, lambda file: file.write("".join(whole).encode()))

    def _read_header(self, folder: Path, kind: str) -> None:
        path = folder / f"{kind}.csv"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if len(lines) > 1:
            self.headers[kind] = next(csv.reader(lines[:1]))
        else:  # a header alone may be of a run with other terms, which left no checkpoint
            path.unlink(missing_ok=True)


def rows(folder: Path, kind: str) -> list[dict[str, float | None]]:
    """What was written so far."""
    path = folder / LINES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [{name: row[name] for name in row if name != "event"} for row in found if row["event"] == kind]


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def _csv_line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _in_csv(line: str, limit: int) -> bool:
    step = line.partition(",")[0]
    return not step.isdigit() or int(step) <= limit  # the header, or a row


def _in_json(line: str, limits: Mapping[str, int]) -> bool:
    row = json.loads(line)
    return bool(row["step"] <= limits[row["event"]])


def _summary_writer() -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise RuntimeError("fit: tensorboard=True needs tensorboard: pip install 'fastkd[distill]' brings it")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
