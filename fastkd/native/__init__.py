"""The C++ extension: loaded once, here, with the reason kept if it cannot be. One file a family calls its kernels."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch  # noqa: F401  (its OpenMP runtime has to be in the process before ours is looked up: one pool of threads)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastkd._C"), None
    except ImportError as error:
        if sys.platform != "linux":  # setup.py's rule
            return None, "the C++ kernels are built on Linux alone"
        return None, f"the C++ extension is not built ({error}); `pip install .` builds it, it needs a C++17 compiler"


_extension, _reason = _load()  # with `import fastkd`: the extension has to know of any fork that comes after


def missing() -> str | None:
    """Why the C++ kernels cannot run, or None if they can."""
    return _reason or wrong_setting()


def wrong_setting() -> str | None:
    """What is wrong with FASTKD_CPU_ISA, if the extension is there and refuses it."""
    try:
        if _extension is not None:
            _extension.instruction_set()
    except RuntimeError as error:
        return str(error)
    return None


def extension() -> ModuleType:
    if _extension is None:
        raise RuntimeError(f"fastkd: {_reason}")
    return _extension
