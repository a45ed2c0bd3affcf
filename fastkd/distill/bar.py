"""A progress bar, where tqdm is installed and somebody looks."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from . import ranks


class Bar:
    """tqdm's, or none. ``wanted`` None: on a terminal."""

    def __init__(self, wanted: bool | None, total: int, initial: int) -> None:
        installed = importlib.util.find_spec("tqdm") is not None
        if wanted and not installed:
            raise RuntimeError("fit: progress=True needs tqdm: pip install 'fastkd[distill]' brings it")
        self._bar: Any = None
        if installed and (sys.stderr.isatty() if wanted is None else wanted) and ranks.rank() == 0:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, **values: float | None) -> None:
        if self._bar is not None:
            self._bar.set_postfix(values)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
