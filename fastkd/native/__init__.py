"""The C++ extension: loaded once, here, with the reason kept if it cannot be. One file a family calls its kernels."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (its OpenMP runtime has to be in the process before ours is looked up: one pool of threads)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastkd._C"), None
    except ImportError as error:
        return None, f"the C++ extension is not built ({error}); `pip install .` builds it, it needs a C++17 compiler"


_extension, _reason = _load()  # with `import fastkd`: the extension has to know of any fork that comes after


def missing() -> str | None:
    """Why there is no C++ extension, or None if there is one."""
    return _reason


def extension() -> ModuleType:
    if _extension is None:
        raise RuntimeError(f"fastkd: {_reason}")
    return _extension
