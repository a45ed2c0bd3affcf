"""What the compiler makes of the matrix products, read as in test_triton_resources.py."""

from __future__ import annotations

import collections
import json
import re
import sys
from typing import Any

import pytest
from test_triton_resources import NoDevice, _compile_instead_of_launching, _cuobjdump, _field, _run

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # that a program can have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
CALLS: dict[str, dict[str, Any]] = {
    "logits": {"product": "logits", "bias": True},
    "input": {"product": "input"},
    "weight": {"product": "weight"},
    "float16": {"product": "logits", "dtypes": ("float16", "float16")},
    "input of many rows": {"product": "input", "rows": 4096},
    "few logits": {"product": "logits", "rows": 500, "vocabulary": 5000, "bias": True},
    "few weights": {"product": "weight", "vocabulary": 5000, "hidden": 264},
    "odd": {"product": "logits", "hidden": 257},
    "odd weight": {"product": "weight", "vocabulary": 5001, "hidden": 257},
    "float32": {"product": "logits", "dtypes": ("float32", "float32"), "bias": True},
    "float32 gradient": {"product": "input", "dtypes": ("float32", "bfloat16")},
    "float32 sum": {"product": "weight", "dtypes": ("float32", "bfloat16")},
}
COMPILED = [(90, call) for call in CALLS]
COMPILED += [(arch, call) for arch in (80, 100, 120) for call in ("logits", "input", "weight")]
COMPILED += [(80, "float32 gradient")]

pytestmark = pytest.mark.xdist_group("matmul resources")  # compiled once, by one worker


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    pytest.importorskip("triton")
    return _run("report", [list(case) for case in COMPILED], __file__)


def _ids(case: tuple[int, str]) -> str:
    return f"sm_{case[0]} {case[1]}"


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_nothing_spills_and_shared_memory_is_enough(case: tuple[int, str], reports: dict[str, Any]) -> None:
    kernel = reports[_ids(case)]
    assert (kernel["stack"], kernel["local"], kernel["spills"]) == (0, 0, 0)
    assert kernel["shared"] <= SHARED_MEMORY[case[0]]


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_the_loop_multiplies_on_tensor_cores_what_was_read_16_bytes_at_a_time(
    case: tuple[int, str], reports: dict[str, Any]
) -> None:
    """Straight into shared memory, a few blocks ahead. float32 is multiplied as such."""
    loop = reports[_ids(case)]["loop"]
    if case[1].startswith("float32"):
        assert loop.get("FFMA", 0) >= 512
        assert not any("MMA" in opcode and opcode != "FFMA" for opcode in loop), loop
    else:
        assert any(opcode.split(".")[0] == TENSOR_CORES[case[0]] for opcode in loop), loop
    if not case[1].startswith("odd"):
        loads = {opcode for opcode in loop if opcode.startswith("LDG")}
        assert loads - {"LDGDEPBAR"}, loop
        # Beside 16 bytes of float32 there are 8 of bfloat16.
        allowed = ("128", "64") if case[1].startswith("float32") else ("128",)
        assert all(x.endswith(allowed) and x.startswith("LDGSTS") for x in loads - {"LDGDEPBAR"}), loads


@pytest.mark.parametrize("call", ["logits", "weight", "input of many rows"])
def test_the_largest_instructions_of_hopper_with_little_beside_them(call: str, reports: dict[str, Any]) -> None:
    """Four products of 64 x 256 x 16 for each of two groups of warps; addresses and barriers are the rest."""
    loop = reports[_ids((90, call))]["loop"]
    assert {opcode: n for opcode, n in loop.items() if "GMMA" in opcode} == {"HGMMA.64x256x16.F32.BF16": 4}
    assert sum(loop.values()) <= 130, loop


def test_one_binary_serves_every_number_of_rows_vocabulary_and_hidden_size() -> None:
    pytest.importorskip("triton")
    shapes: list[dict[str, Any]] = [
        {"rows": 1024, "vocabulary": 16384, "hidden": 512},
        {"rows": 1, "vocabulary": 128256, "hidden": 520},
        {"rows": 1000, "vocabulary": 50257, "hidden": 1000},
        {"rows": 1017, "vocabulary": 50304, "hidden": 504, "scale": 0.5, "count_offset": 1},
    ]
    for product in ("logits", "weight"):
        assert _run("count", [{"product": product} | shape for shape in shapes], __file__) == 1


def _call(
    product: str, rows: int = 1024, vocabulary: int = 16387, hidden: int = 4096, bias: bool = False,
    dtypes: tuple[str, str] = ("bfloat16", "bfloat16"), scale: float = 1.0, count_offset: int = 0,
) -> None:  # fmt: skip
    """One product of numbers that do not matter."""
    import torch
    from fastkd_kernels import matmul

    first, second = (getattr(torch, name) for name in dtypes)
    padded = vocabulary + -vocabulary % 8
    gradient = torch.empty(rows, padded, dtype=first)[:, :vocabulary]
    weight, count = torch.empty(vocabulary, hidden, dtype=second), torch.zeros(2, dtype=torch.int64)[count_offset]
    if product == "logits":
        out = torch.empty(rows, padded)[:, :vocabulary]
        added = torch.empty(vocabulary + 1, dtype=second)[count_offset:-1] if bias else None
        added = added if added is None else added[:vocabulary]
        matmul.multiply(torch.empty(rows, hidden, dtype=first), weight.t(), count, out, bias=added, scale=scale)
    elif product == "input":
        matmul.multiply(gradient, weight, count, torch.empty(rows, hidden), scale=scale)
    else:
        total = torch.empty(vocabulary, hidden)
        matmul.add_outer(total, gradient, torch.empty(rows, hidden, dtype=second), count, scale=scale)


def _report(kernel: Any) -> dict[str, Any]:
    usage, sass = (_cuobjdump(kernel.asm["cubin"], option) for option in ("--dump-resource-usage", "--dump-sass"))
    instructions = [
        (int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text))
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    ]
    opcodes = [text.split()[0] for _, text in instructions]
    return {
        "registers": _field(usage, "REG"),
        "stack": _field(usage, "STACK"),
        "local": _field(usage, "LOCAL"),
        "shared": kernel.metadata.shared,
        "spills": sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        "loop": max(_loops(instructions), key=lambda loop: sum(n for opcode, n in loop.items() if _multiplies(opcode))),
    }


def _multiplies(opcode: str) -> bool:
    return "MMA" in opcode or opcode == "FFMA"


def _loops(instructions: list[tuple[int, str]]) -> list[dict[str, int]]:
    loops = []
    for address, text in instructions:
        jump = re.match(r"BRA.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append([t.split()[0] for a, t in instructions if int(jump[1], 16) <= a <= address])
    return [dict(collections.Counter(loop)) for loop in loops]


def _main(task: str, argument: Any) -> object:
    from fastkd_kernels import matmul
    from triton.runtime.driver import driver

    driver.set_active(NoDevice(90))
    compiled = _compile_instead_of_launching()
    if task == "report":
        reports = {}
        for architecture, name in argument:
            driver.set_active(NoDevice(architecture))
            matmul._shared_memory = lambda _, architecture=architecture: SHARED_MEMORY[architecture]
            compiled.clear()
            _call(**CALLS[name])
            ((_, kernel, _),) = compiled
            reports[_ids((architecture, name))] = _report(kernel)
        return reports
    matmul._shared_memory = lambda _: SHARED_MEMORY[90]
    for call in argument:
        _call(**call)
    return len({id(kernel) for _, kernel, _ in compiled})


if __name__ == "__main__":
    json.dump(_main(sys.argv[1], json.loads(sys.argv[2])), sys.stdout)
