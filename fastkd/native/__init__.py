"""The C++ extension: loaded once, here, with the reason kept if it cannot be. One file a family calls its kernels."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


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


def missing_on_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on this device, or None if they can."""
    if _extension is None:
        return _reason
    if not _extension.cuda_architectures:
        return "the C++ extension was built without CUDA; with nvcc on the PATH, `pip install .` builds it"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    count = _extension.cuda_device_count()
    if count <= 0:
        return f"the driver is missing, or too old for the C++ extension's CUDA kernels (CUDA error {-count})"
    compiled = [divmod(int(name), 10) for name in _extension.cuda_architectures.split(",")]
    major, minor = torch.cuda.get_device_capability(device)
    # A binary runs on later minor versions; the last architecture is there in a form that later ones compile.
    if (major, minor) >= compiled[-1] or any(major == one and minor >= other for one, other in compiled):
        return None
    return f"the CUDA kernels are compiled for {_extension.cuda_architectures}, and this device is {major}{minor}"


def extension() -> ModuleType:
    if _extension is None:
        raise RuntimeError(f"fastkd: {_reason}")
    return _extension
