"""Who takes part in a bench: made, checked, and otherwise listed with the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from bench.measure import Contender
from fastkd import _dispatch

NAMES = {package: name for name, package in _dispatch.PACKAGES.items()}


class Unavailable(Exception):
    """This provider cannot run here; the message says why."""


def need(module: str) -> None:
    package = module.partition(".")[0]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a parent of the module is not there
        found = None
    if found is None:
        raise Unavailable(f"{package} is not installed")


def able(
    names: Iterable[str], make: Callable[[str], Contender], check: Callable[[Contender], None]
) -> tuple[list[Contender], dict[str, str]]:
    """Those who can run and whose numbers ``check`` finds right, and why the others cannot."""
    contenders, absent = [], {}
    for name in names:
        try:
            contender = make(name)
            check(contender)
        except Unavailable as reason:
            absent[name] = str(reason)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
        else:
            contenders.append(contender)
    return contenders, absent


def compile_now(contender: Contender) -> None:
    contender.prepare()
    try:
        contender.run()
    except BackendCompilerFailed as error:
        raise Unavailable(f"torch.compile fails here: {' '.join(str(error).split()[:40])}") from error


def implementation(op: str, impl: str | None, *tensors: Tensor) -> str:
    """The name of what runs."""
    try:
        module = _dispatch.pick(op, impl, tensors[0], tensors[1:])
    except (RuntimeError, ImportError) as error:
        raise Unavailable(str(error)) from error
    return NAMES[module.__name__.rpartition(".")[0]]


def rows_that_fit(bytes_per_row: int, device: torch.device, most: int) -> int:
    """A power of two, so that eager code fits into half of the memory that is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 2 ** (max(1, min(most, free // 2 // bytes_per_row)).bit_length() - 1)
