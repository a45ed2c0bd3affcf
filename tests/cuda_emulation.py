"""The CUDA kernels without a GPU: csrc/cuda compiled by g++ with the header in tests/cuda_on_cpu in place of CUDA's."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "cuda_on_cpu"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{HERE / 'include'}")
# A number of rows or of bytes that is cut to 32 bits is an error here.
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unknown-pragmas")
# Calls what watch.cpp has at each access, and reads a float4 as such.
WATCHED = ("-O1", "-fsanitize=thread", "-fno-tree-sra", "-x", "c++", *WARNINGS)
GUARD = 64  # elements that hold NaN on either side of a buffer


def build(folder: Path) -> ModuleType:
    """What fastkd._C has of CUDA, and the controls of the machine that runs it."""
    import pybind11

    python = ("-O0", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}")
    units = [(unit, WATCHED) for unit in [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "faults.cu"]]
    units += [(HERE / f"{name}.cpp", ("-O3",)) for name in ("machine", "instructions", "watch")]
    units.append((HERE / "module.cpp", python))
    objects = []
    for unit, flags in units:
        objects.append(folder / f"{unit.stem}.o")
        _run(["g++", *FLAGS, *flags, "-c", str(unit), "-o", str(objects[-1])])
    target = folder / f"cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(["g++", "-shared", *map(str, objects), "-o", str(target)])
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def missing() -> str | None:
    """Why there is no machine, or None."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "there is no pybind11"
    return None


MARKS = [
    pytest.mark.skipif(missing() is not None, reason=f"{missing()}"),
    pytest.mark.xdist_group("cuda on cpu"),  # compiled once, by one worker
]


class Machine:
    """The functions of the module, called with tensors where they take addresses.

    Tensors among the arguments are what the kernels may touch; those in ``outputs`` hold nothing yet. They are put
    between elements that hold NaN, which a kernel must leave alone, and what it reads there shows in its results.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def call(self, name: str, *arguments: Any, outputs: Sequence[Tensor] = ()) -> None:
        """With the tensors' addresses; raises what the machine saw."""
        found = self.run(name, *arguments, outputs=outputs)
        assert found == [], "\n".join(found)

    def run(self, name: str, *arguments: Any, outputs: Sequence[Tensor] = ()) -> list[str]:
        self.module.forget()
        written = {id(output) for output in outputs}
        guards: list[tuple[Tensor, Tensor, Tensor]] = []

        def address(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(address(x) for x in value)
            if not isinstance(value, Tensor):
                return value
            inside = next((view for tensor, view, _ in guards if tensor is value), None)
            if inside is None:
                inside = self._guarded(value, id(value) in written, guards)
            return inside.data_ptr()

        getattr(self.module, name)(*(address(value) for value in arguments))
        for tensor, view, around in guards:
            edges = torch.cat([around[: GUARD * view.element_size()], around[-GUARD * view.element_size() :]])
            assert bool((edges == 0xFF).all()), f"{name} wrote beyond a tensor of shape {tuple(tensor.shape)}"
            if id(tensor) in written:
                tensor.copy_(view)
            else:
                same = tensor.reshape(-1).view(torch.uint8), view.reshape(-1).view(torch.uint8)
                assert torch.equal(*same), f"{name} wrote into an input of shape {tuple(tensor.shape)}"
        return list(self.module.reports())

    def _guarded(self, tensor: Tensor, output: bool, guards: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        size = tensor.element_size()
        around = torch.full(((tensor.numel() + 2 * GUARD) * size,), 0xFF, dtype=torch.uint8)
        inside = around[GUARD * size : around.numel() - GUARD * size].view(tensor.dtype).view(tensor.shape)
        if not output:
            inside.copy_(tensor)
        self.module.add_buffer(inside.data_ptr(), inside.numel() * size, not output)
        guards.append((tensor, inside, around))
        return inside

    @contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Threads and blocks take their turns at random; 0: as they are numbered."""
        self.module.shuffle(seed)
        try:
            yield
        finally:
            self.module.shuffle(0)
