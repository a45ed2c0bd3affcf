"""The C++ extension: loaded once, here, with the reason kept if it cannot be. One file a family calls its kernels."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch  # noqa: F401  (its OpenMP runtime has to be in the process before ours is looked up: one pool of threads)


@lru_cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastkd._C"), None
    except ImportError as error:
        return None, f"the C++ extension is not built ({error}); `pip install .` builds it, it needs a C++17 compiler"


def missing() -> str | None:
    """Why there is no C++ extension, or None if there is one."""
    return _load()[1]


def extension() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"fastkd: {reason}")
    return module
