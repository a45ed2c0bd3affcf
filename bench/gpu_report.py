"""How checks on a GPU machine are run and reported, whatever they check."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fastkd
from bench.gate import Wrong

CANNOT_RUN = 2  # exit status


def run_all(checks: Mapping[str, Callable[[], Any]]) -> int:
    """Each of them, whatever became of the one before. The exit status."""
    failed = [name for name, check in checks.items() if not report(name, check)]
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all ok")
    return int(bool(failed))


def report(name: str, check: Callable[[], Any]) -> bool:
    start = time.perf_counter()
    try:
        check()
    except Exception as error:  # a check that crashes is one that failed; the others still run
        print(f"FAILED  {name}: {type(error).__name__}: {str(error).strip()}{_where(error)}", flush=True)
        return False
    print(f"ok      {name} ({time.perf_counter() - start:.1f} s)", flush=True)
    return True


def _where(error: Exception) -> str:
    """The line of fastkd that failed, so that one run on a machine far away is enough; nothing of a wrong number."""
    package = str(Path(fastkd.__file__).parent)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    if not lines or isinstance(error, Wrong):
        return ""
    last = lines[-1]
    return f" (at fastkd{last.filename.removeprefix(package)}:{last.lineno}: {last.line})"


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this mode does not see every synchronisation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
