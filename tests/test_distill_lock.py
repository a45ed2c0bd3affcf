"""Two runs in one folder: the second one is kept out for as long as the process of the first one lives."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distill_training import SGD, both, csv_rows, rows, same
from processes import run_python
from torch import nn

from fastkd.distill import curves, lock

GOING_ON = r"^fit: out must be a folder in which no run is going on, got .*, where process {} on .* trains$"
OPTIONS: dict[str, Any] = {"batch_size": 8, "optimizer": SGD, "log_every": 1}
locks = pytest.mark.skipif(lock.flock is None, reason="this system has no flock")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "draw", lambda folder: None)


@locks
@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_second_run_is_refused_and_harms_none(resume: bool | str, tmp_path: Path) -> None:
    alone, first, second = both(), both(), both()

    def intrude(student: nn.Module) -> float:
        with pytest.raises(ValueError, match=GOING_ON.format(os.getpid())):
            second.fit(rows(), epochs=1, out=tmp_path, resume=resume, **OPTIONS)
        return 0.0

    alone.fit(rows(), epochs=2, **OPTIONS)
    first.fit(rows(), epochs=2, out=tmp_path, evaluate=intrude, evaluate_every=1, save_every=1, **OPTIONS)
    same(alone, first, rtol=0, atol=0)
    same(second, both(), rtol=0, atol=0)
    assert len(csv_rows(tmp_path / "train.csv")) == 6
    assert second.fit(rows(), epochs=3, out=tmp_path, resume=True, evaluate=lambda _: {"intrude": 0.0}, **OPTIONS)


@locks
def test_a_run_that_fails_lets_go(tmp_path: Path) -> None:
    def fails(student: nn.Module) -> float:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            both().fit(rows(), epochs=1, out=tmp_path, evaluate=fails, **OPTIONS)
    both().fit(rows(), epochs=1, out=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="fit: out must hold no run"):
        both().fit(rows(), epochs=1, out=tmp_path, **OPTIONS)
    both().fit(rows(), epochs=2, out=tmp_path, resume=True, **OPTIONS)


@locks
def test_it_ends_with_the_process_and_not_with_its_children(tmp_path: Path) -> None:
    """Whether that was forked, as a loader's worker is, or started."""
    code = """
        import os, subprocess, sys, time
        from pathlib import Path
        from fastkd.distill import lock
        with lock.held(Path(sys.argv[1])):
            child = os.fork()
            if child == 0:
                time.sleep(60)
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            print(child, started.pid, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    try:
        with pytest.raises(ValueError, match=GOING_ON.format(process.pid)), lock.held(tmp_path):
            pass
        process.kill()
        process.wait()
        for child in children:
            os.kill(child, 0)  # it is still there
        with lock.held(tmp_path):
            pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        process.stdout.close()


@locks
def test_a_fork_that_leaves_the_context_keeps_the_lock_where_it_was(tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from fastkd.distill import lock
        out = Path(sys.argv[1])
        with lock.held(out):
            child = os.fork()
            if child:
                assert os.waitpid(child, 0)[1] == 0
                try:
                    with lock.held(out):
                        print("twice")
                except ValueError:
                    print("once")
                os._exit(sys.stdout.flush() or 0)
            other = os.open(out / "other", os.O_CREAT)  # which gets the number that the lock's file had
        os.fstat(other)
        os._exit(0)
    """
    assert run_python(code, str(tmp_path)) == "once\n"


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "flock", _raises(errno.ENOLCK))
    with pytest.warns(UserWarning, match=r"fit: .* cannot be locked \(No locks available\): start no other run in it"):
        both().fit(rows(), epochs=1, out=tmp_path, **OPTIONS)
    monkeypatch.setattr(lock, "flock", _raises(errno.EIO))
    free = next_handle()
    with (
        pytest.raises(OSError, match=r"fit: out cannot be locked: Input/output error: '.*\.lock'"),
        lock.held(tmp_path),
    ):
        pass
    assert next_handle() == free
    monkeypatch.setattr(lock, "flock", None)
    both().fit(rows(), epochs=2, out=tmp_path, resume=True, **OPTIONS)
    assert not lock._held


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"fit: out must be a folder to write in: Not a directory: '.*/a'"):
        both().fit(rows(), epochs=1, out=tmp_path / "file" / "a", **OPTIONS)
    monkeypatch.setattr(os, "open", _raises(errno.EROFS))
    with pytest.raises(OSError, match=r"fit: out must be a folder to write in: Read-only file system: '.*'"):
        both().fit(rows(), epochs=1, out=tmp_path, **OPTIONS)


def test_a_run_that_is_not_there_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fit: out must hold a last.pt to resume from, got .*typo"):
        both().fit(rows(), epochs=1, out=tmp_path / "typo", resume=True, **OPTIONS)
    assert not list(tmp_path.iterdir())


def next_handle() -> int:
    """The lowest number that no open file has."""
    handle = os.open(os.devnull, os.O_RDONLY)
    os.close(handle)
    return handle


def _raises(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail
