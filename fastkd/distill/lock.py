"""One run at a time in a folder."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import _checks
from . import ranks

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    flock = None  # type: ignore[assignment]

NAME = ".lock"
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # what file systems without locks say
_held: set[int] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """No other run begins in this folder meanwhile. The system forgets the lock with this process, however that ends.

    Rank 0 makes the folder and has the lock; what keeps it from that is an error on all ranks.
    """
    handle: int | None = None
    problem: Exception | None = None
    if ranks.rank() == 0:
        try:
            handle = _locked(folder)
        except (OSError, ValueError) as error:
            problem = error
    problem = ranks.from_first(problem)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if handle in _held:  # not so in a process that was forked meanwhile
            _held.remove(handle)
            os.close(handle)


def _locked(folder: Path) -> int:
    """The file whose lock this process has."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(error.errno, f"fit: out must be a folder to write in: {error.strerror}", str(folder)) from error
    try:
        _lock(handle, path)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        os.close(handle)
        raise
    _held.add(handle)
    return handle


def _lock(handle: int, path: Path) -> None:
    if flock is None:
        return
    try:
        flock(handle, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        who = path.read_text() or "another process"
        _checks.bad_value("fit", "out", "be a folder in which no run is going on", f"{path.parent}, where {who} trains")
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise OSError(error.errno, f"fit: out cannot be locked: {error.strerror}", str(path)) from error
        message = f"fit: {path.parent} cannot be locked ({error.strerror}): start no other run in it"
        warnings.warn(message, stacklevel=2)


def _let_go() -> None:
    """A loader's worker would have the lock still when its run was killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if flock is not None:
    os.register_at_fork(after_in_child=_let_go)
