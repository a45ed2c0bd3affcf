"""What the compilers make of the CUDA kernels for each architecture: no device is needed."""

from __future__ import annotations

import collections
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastkd import native

RESERVED = 1024  # bytes of shared memory that the driver takes of each block, on some architectures
# The most registers and bytes of shared memory. A multiprocessor has 64 K registers, so it holds this many blocks.
LIMITS = {
    "angles": (168, 13 << 10),  # 6 of 64 threads
    "angles_and_slopes": (255, 22 << 10),  # 4
    "prepare": (48, 0),
    "add_tiles": (80, 0),
    "finish_slopes": (64, 0),
    "add_losses": (48, 64),
    "square_distances": (64, 0),
    "pull_rows": (80, 8 << 10),
    "add_distances": (64, 64),
    "compare_distances": (64, 64),
    "finish_distances": (80, 64),
    "quantize_rows": (40, 16),
    "few_rows": (80, 8 << 10),  # 3 of 256 threads
    "few_rows_odd": (104, 8 << 10),  # 2
    "few_rows_fused": (80, 21 << 10),  # 3
    "few_rows_fused_odd": (80, 21 << 10),  # 3
    "small_tiles": (104, 32 << 10),  # 4 of 128 threads
    "small_tiles_odd": (112, 32 << 10),  # 4
    "large_tiles": (128, 48 << 10),  # 2 of 256
    "finish_parts": (64, 0),
}


@functools.lru_cache
def _cuobjdump(*options: str) -> str:
    """Of what the extension holds."""
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    extension = native.extension()
    if not extension.cuda_architectures:
        pytest.skip("the extension was built without CUDA")
    return subprocess.run([tool, *options, extension.__file__], check=True, capture_output=True, text=True).stdout


def _by_architecture(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^Fatbin elf code:", text, flags=re.MULTILINE)[1:]:
        yield re.search(r"arch = sm_(\d+)", part)[1], part


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """Kernel and architecture -> what it takes."""
    found = {}
    for architecture, part in _by_architecture(_cuobjdump("--dump-resource-usage")):
        for name, line in re.findall(r"Function (\S+?):\s+(.*)", part):
            found[_kernel(name), architecture] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def _kernel(mangled: str) -> str:
    """The name that follows the unit's own namespace."""
    return re.search(r"_cu_[0-9a-f]{8}\d+([a-z_]+)E", mangled)[1]


@pytest.mark.parametrize("kernel", LIMITS)
def test_nothing_spills(usage: dict[tuple[str, str], dict[str, int]], kernel: str) -> None:
    """Spilled registers are memory on the stack."""
    registers, shared = LIMITS[kernel]
    for architecture in native.extension().cuda_architectures.split(","):
        takes = usage[kernel, architecture]
        assert (takes["STACK"], takes["LOCAL"]) == (0, 0), architecture
        assert takes["REG"] <= registers, architecture
        assert takes["SHARED"] <= shared + RESERVED, architecture


def test_every_kernel_is_listed(usage: dict[tuple[str, str], dict[str, int]]) -> None:
    assert {kernel for kernel, _ in usage} == set(LIMITS)


def test_a_triple_of_rows_costs_some_36_instructions() -> None:
    """Two cosines of 8, their difference, Huber's function and five sums, and a 16th of what its anchor costs."""
    for architecture, part in _by_architecture(_cuobjdump("--dump-sass")):
        functions = [text for text in part.split("Function : ")[1:] if _kernel(text.split()[0]) == "angles_and_slopes"]
        for function in functions:
            loop = _inner_loop(function)
            assert loop["DADD"] == 3 * 16 + 7, (
                architecture
            )  # of the 7 one is the loss, the others add up over the block
            assert loop["LDS"] == 12, architecture
            assert sum(n for opcode, n in loop.items() if opcode != "NOP") <= 38 * 16, architecture


def _inner_loop(sass: str) -> collections.Counter[str]:
    """The shortest in which the 16 triples are."""
    instructions = [
        (int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text))
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    ]
    loops = []
    for address, text in instructions:
        jump = re.match(r"BRA.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t.split()[0].split(".")[0] for a, t in instructions if int(jump[1], 16) <= a <= address]
            loops.append(collections.Counter(body))
    return min((loop for loop in loops if loop["DADD"] >= 48), key=lambda loop: sum(loop.values()))


def test_tiles_are_multiplied_by_tensor_cores_and_filled_by_copies() -> None:
    """Of a stage, 64 terms: so many products of 16 x 8 x 32, and operands that come four at a time."""
    # Warps have 32 x 32 sums, or 64 x 32.
    products = {"small_tiles": 2 * 8, "large_tiles": 2 * 16}
    operands = {"small_tiles": 2 * 4, "large_tiles": 2 * 6}
    for architecture, part in _by_architecture(_cuobjdump("--dump-sass")):
        for text in part.split("Function : ")[1:]:
            kernel = _kernel(text.split()[0])
            if kernel not in products:
                continue
            found = collections.Counter(re.findall(r"\b(IMMA\.16832|LDSM\.16\.M88\.4|LDGSTS)", text))
            assert found["IMMA.16832"] == products[kernel], (kernel, architecture)
            assert found["LDSM.16.M88.4"] == operands[kernel], (kernel, architecture)
            assert found["LDGSTS"] > 0, (kernel, architecture)
