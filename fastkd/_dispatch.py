"""Who computes it. The only file that chooses an implementation; :func:`explain` says how it would choose.

An implementation that is pinned (``impl="native"``) is obeyed or refused, never replaced. Without a pin the first of
:data:`ORDER` that does not refuse is taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import native

Dtypes = tuple[torch.dtype, ...]

ORDER = ("triton", "native", "algebra", "reference")
PACKAGES = {
    "triton": "fastkd_kernels",
    "native": "fastkd.native",
    "algebra": "fastkd.algebra",
    "reference": "fastkd.reference",
}
# operation -> the file name of its family; in brackets the passes over the logits that a kind of teacher needs more, or
# the option that takes matmuls which torch does not have
OPERATIONS = {
    "kd_loss": "logit",
    "kd_loss(TopK)": "topk",
    "cross_entropy": "logit",
    "dkd_loss": "logit",
    "nkd_loss": "logit",
    "wsld_weights": "logit",
    "wsld_loss": "logit",
    "dist_loss": "dist",
    'Head(compact="device")': "matmul",
    "gram_loss": "gram",
    "cosine_relation_loss": "gram",
    "similarity_preserving_loss": "gram",
    "cka_loss": "gram",
    "attention_kl_loss": "attention",
    "pairwise_distance": "distance",
    "pairwise_cosine": "cosine",
    "rkd_distance_loss": "rkd",
    "rkd_angle_loss": "rkd",
    "pkt_loss": "similarity",
    "correlation_congruence_loss": "similarity",
    "hint_loss": "hint",
    "attention_transfer_loss": "attention_maps",
    "nst_loss": "nst",
    "int8_linear": "int8_linear",
    "int8_conv2d": "int8_conv2d",
    "int8_embedding": "int8_embedding",
    "int8_weight_only_linear": "int8_weight_only",
}
ANYWHERE = ("algebra", "reference")  # made of torch's operations: no device and no dtype is refused
ON_CUDA = ("rkd", "distance", "int8_linear")  # families whose native file has CUDA kernels, too
LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
_STORAGE = frozenset((torch.float16, torch.bfloat16, torch.float32))


def pick(op: str, impl: str | None, student: Tensor, others: Sequence[Tensor]) -> ModuleType:
    """The module that computes ``op`` on these tensors."""
    if impl is not None and not isinstance(impl, str):
        raise TypeError(f"{op}: impl must be a name or None, got {type(impl).__name__}")
    return _choose(op, impl, student.device, (student.dtype, *[tensor.dtype for tensor in others]))


@lru_cache(maxsize=1024)
def _choose(op: str, impl: str | None, device: torch.device, dtypes: Dtypes) -> ModuleType:
    if impl is not None:
        return _pinned(op, impl, device, dtypes)
    name, reason = _first(op, device, dtypes)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}")
    if name in ANYWHERE and _refusal(op, "native", device, dtypes) == native.missing():
        _say_once(f"fastkd runs on eager PyTorch here, slowly: {native.missing()}")
    return _module(name, OPERATIONS[op])


def _first(op: str, device: torch.device, dtypes: Dtypes) -> tuple[str, str | None]:
    """Who a call without a pin gets, and why that raises: for a wrong setting nobody stands in silently."""
    for name in ORDER:
        reason = _refusal(op, name, device, dtypes)
        if reason is None or (name == "native" and reason == native.wrong_setting()):
            return name, reason
    # Nobody can. Of those that could elsewhere the first says why.
    name = next(iter(_written(op)), ORDER[0])
    return name, _refusal(op, name, device, dtypes)


def _pinned(op: str, impl: str, device: torch.device, dtypes: Dtypes) -> ModuleType:
    if impl not in ORDER:
        raise ValueError(f"{op}: impl must be one of {', '.join(_written(op))}, got {impl!r}")
    reason = _refusal(op, impl, device, dtypes, pinned=True)
    if reason is not None:
        others = ", ".join(name for name in ORDER if _refusal(op, name, device, dtypes, pinned=True) is None)
        raise RuntimeError(f"{op}: impl={impl!r} cannot run here: {reason}; what can: {others or 'nothing'}")
    return _module(impl, OPERATIONS[op])


def _module(name: str, family: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGES[name]}.{family}")


@lru_cache
def _say_once(message: str) -> None:
    """Warns, and names the line that called us, through torch's modules and operators if need be."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    code, scope = frame.f_code, frame.f_globals
    warnings.warn_explicit(message, RuntimeWarning, code.co_filename, frame.f_lineno, scope.get("__name__"))


def _refusal(op: str, name: str, device: torch.device, dtypes: Dtypes, pinned: bool = False) -> str | None:
    """Why an implementation does not compute an operation on such tensors, or None if it does."""
    family = OPERATIONS[op]
    on_cuda = name == "native" and device.type == "cuda" and family in ON_CUDA
    refuse = _refuse_native_on_cuda if on_cuda else _REFUSALS[name]
    return _unwritten(f"{PACKAGES[name]}.{family}") or refuse(device, dtypes, pinned)


def _written(op: str) -> list[str]:
    return [name for name in ORDER if _unwritten(f"{PACKAGES[name]}.{OPERATIONS[op]}") is None]


def _unwritten(module: str) -> str | None:
    """A family may have its reference before it has any kernel."""
    try:
        return None if importlib.util.find_spec(module) else f"there is no {module}"
    except ModuleNotFoundError as error:  # not even its package
        return str(error)


def _refuse_triton(device: torch.device, dtypes: Dtypes, pinned: bool) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and pinned and _interpreted()):
        hint = " (TRITON_INTERPRET=1 interprets them on the CPU)" if pinned and device.type == "cpu" else ""
        return f"the tensors are on {device.type}, Triton kernels need a CUDA device{hint}"
    return _missing_triton() or _wide(dtypes)


def _refuse_native(device: torch.device, dtypes: Dtypes, pinned: bool) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}, the C++ kernels run on the CPU"
    return _wide(dtypes) or native.missing()


def _refuse_native_on_cuda(device: torch.device, dtypes: Dtypes, pinned: bool) -> str | None:
    return _wide(dtypes) or native.missing_on_cuda(device)


def _refuse_nothing(device: torch.device, dtypes: Dtypes, pinned: bool) -> str | None:
    return None


def _wide(dtypes: Dtypes) -> str | None:
    wide = next((dtype for dtype in dtypes if dtype not in _STORAGE), None)
    return None if wide is None else f"no kernel computes {str(wide).removeprefix('torch.')}"


def _missing_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed (it is published for Linux alone)"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_REFUSALS: dict[str, Callable[[torch.device, Dtypes, bool], str | None]] = {
    "triton": _refuse_triton,
    "native": _refuse_native,
    **dict.fromkeys(ANYWHERE, _refuse_nothing),
}


def explain(op: str | None = None, *tensors: Tensor) -> None:
    """Print, for one operation or all, every implementation with "ok" or why it is passed over, and which one runs.

    A setting that the C++ kernels refuse (FASTKD_CPU_ISA) makes a call raise, and no other implementation stands in. So
    does an operation that nobody computes here.

    Args:
        op: Name of an operation, such as ``"kd_loss"``; None for all.
        tensors: What it would be called with; the student's logits first. Default: float32 on the device that
            ``torch.get_default_device()`` names, or on CUDA where there is one.

    Raises:
        ValueError: no operation has that name.

    Example:
        >>> explain("kd_loss", torch.zeros(2, 3, dtype=torch.float64))
        kd_loss
          triton     the tensors are on cpu, Triton kernels need a CUDA device
          native     no kernel computes float64
          algebra    there is no fastkd.algebra.logit
          reference  ok <- runs
    """
    if op is not None and op not in OPERATIONS:
        raise ValueError(f"explain: op must be one of {', '.join(OPERATIONS)}, got {op!r}")
    if not tensors:
        default = "cuda" if torch.cuda.is_available() else torch.get_default_device()
        tensors = (torch.empty(1, 1, device=default, dtype=torch.float32),)
    device, dtypes = tensors[0].device, tuple(x.dtype for x in tensors)
    for name in OPERATIONS if op is None else (op,):
        print(name)
        first, raised = _first(name, device, dtypes)
        for implementation in ORDER:
            reason = _refusal(name, implementation, device, dtypes)
            fate = "" if implementation != first else " <- raises" if raised else " <- runs"
            print(f"  {implementation:<10} {reason or 'ok'}{fate}")
