"""How much memory a stretch of code needed at its peak, as the operating system counts it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEANING = "how far the resident set of the process rises during a step (VmHWM of Linux)"


class Peak:
    """The growth of the resident set from here to its highest point.

    Unlike a count of tensors this also sees what kernels allocate for themselves. It needs Linux, which lets a process
    set its own high-water mark back; elsewhere ``bytes`` gives None.
    """

    def __init__(self) -> None:
        self._base = 0
        if available():
            _set_mark_back()
            self._base = _field("VmRSS")

    def bytes(self) -> int | None:
        return max(0, _field("VmHWM") - self._base) if available() else None


@lru_cache
def available() -> bool:
    """Whether the mark really comes back down: some sandboxes accept the request and ignore it."""
    try:
        block = bytearray(b"\1") * (64 << 20)  # large enough for the allocator to give it back at once
        del block
        _set_mark_back()
        return _field("VmHWM") - _field("VmRSS") < 32 << 20
    except (OSError, ValueError):
        return False


def _set_mark_back() -> None:
    CLEAR_REFS.write_text("5")


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no {name}")
