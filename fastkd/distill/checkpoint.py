"""Files that are whole or not there at all, and what a checkpoint may hold."""

from __future__ import annotations

import os
import pickle
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .. import _checks

TEMPORARY = ".unfinished"
PLAIN = (bool, int, float, str, bytes, torch.Size, torch.device)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint that ``torch.load(path, weights_only=True)`` reads, or leave the file that was there."""
    check_plain("checkpoint", state)
    replace(path, lambda file: torch.save(dict(state), file))


def load(path: Path) -> dict[str, Any]:
    """All tensors on the CPU; ``load_state_dict`` brings them where they belong."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        _checks.bad_value("fit", "out", "hold checkpoints that fit has written", path)
    if not isinstance(state, dict):
        _checks.bad_value("fit", "out", "hold checkpoints that fit has written", path)
    return state


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside it and rename that: whenever this is interrupted, the old file or the new one is there.

    The file is on the disk before it has the name, and the name before this returns. Two processes that write the same
    file do not write into one another's.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:  # a full disk needs the place
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def clear(folder: Path) -> None:
    """Remove what an interrupted run began to write."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_plain(where: str, value: Any) -> None:
    """An error for what ``weights_only=True`` would refuse to read, before it is written."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(f"{where}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(f"{where}[{index}]", item)
    elif not (value is None or type(value) in PLAIN or isinstance(value, (Tensor, torch.dtype))):
        _checks.bad_type("fit", where, "hold tensors, numbers, strings, lists and dicts alone", type(value).__name__)
