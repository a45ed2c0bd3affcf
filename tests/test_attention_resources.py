"""What the compiler makes of the Triton kernels for attention scores, read as in test_triton_resources.py."""

from __future__ import annotations

import collections
import json
import re
import sys
from typing import Any

import pytest
from test_matmul_resources import SHARED_MEMORY, TENSOR_CORES
from test_triton_resources import NoDevice, _compile_instead_of_launching, _cuobjdump, _field, _run

KERNELS = ("row_values", "query_gradients", "key_gradients")
CALLS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "float16 of 128": {"dtype": "float16", "dims": (128, 128)},
    "masked, itself": {"masked": True, "same": True, "dims": (32, 80)},
    "float32": {"dtype": "float32", "causal": True},
}
COMPILED = [(90, call) for call in CALLS]
COMPILED += [(80, "float16 of 128"), (80, "float32"), (100, "causal"), (120, "float16 of 128")]

pytestmark = pytest.mark.xdist_group("attention resources")  # compiled once, by one worker


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    pytest.importorskip("triton")
    return _run("report", [list(case) for case in COMPILED], __file__)


def _ids(case: tuple[int, str]) -> str:
    return f"sm_{case[0]} {case[1]}"


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_nothing_spills_and_shared_memory_is_enough(case: tuple[int, str], reports: dict[str, Any]) -> None:
    assert [kernel["name"] for kernel in reports[_ids(case)]] == list(KERNELS)
    for kernel in reports[_ids(case)]:
        assert (kernel["stack"], kernel["local"], kernel["spills"]) == (0, 0, 0), kernel["name"]
        assert kernel["shared"] <= SHARED_MEMORY[case[0]], kernel["name"]


@pytest.mark.parametrize("case", COMPILED, ids=_ids)
def test_tokens_are_read_16_bytes_at_a_time_and_multiplied_on_tensor_cores(
    case: tuple[int, str], reports: dict[str, Any]
) -> None:
    """float32 is multiplied as such. Small pieces are read 8 bytes at a time; single numbers are of rows, and masks."""
    for kernel in reports[_ids(case)]:
        opcodes = kernel["opcodes"]
        reads = {opcode: n for opcode, n in opcodes.items() if opcode.startswith(("LDG.", "LDGSTS"))}
        wide = ("128",) if case[1] in ("causal", "float16 of 128") else ("128", "64")
        assert sum(n for opcode, n in reads.items() if opcode.endswith(wide)) >= 8, (kernel["name"], reads)
        assert not any("U16" in opcode for opcode in reads), (kernel["name"], reads)
        cores = [opcode for opcode in opcodes if opcode.startswith(("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA"))]
        if case[1].startswith("float32"):
            assert not cores, (kernel["name"], cores)
            assert opcodes["FFMA"] >= 500, (kernel["name"], opcodes)
        else:
            assert any(opcode.startswith(TENSOR_CORES[case[0]]) for opcode in cores), (kernel["name"], opcodes)


def test_one_binary_serves_every_number_of_tokens_heads_and_sequences() -> None:
    pytest.importorskip("triton")
    calls: list[dict[str, Any]] = [
        {"tokens": 4096},
        {"tokens": 1, "batch": 1},
        {"tokens": 333, "heads": 6, "groups": 1},
        {"tokens": 64, "heads": 16, "groups": 16},
    ]
    assert _run("count", calls, __file__) == dict.fromkeys(KERNELS, 1)


def _call(
    dtype: str = "bfloat16", dims: tuple[int, int] = (64, 64), causal: bool = False, masked: bool = False,
    same: bool = False, tokens: int = 4096, heads: int = 8, groups: int = 2, batch: int = 2, offset: int = 0,
) -> None:  # fmt: skip
    """Forward and backward of a problem whose numbers do not matter."""
    import torch
    from fastkd_kernels import attention

    from fastkd._attention import AttentionRows

    def tensor(heads: int, dim: int) -> torch.Tensor:
        shape = (batch, tokens, heads, dim)
        memory = torch.empty(torch.Size(shape).numel() + offset, dtype=getattr(torch, dtype))
        return memory[offset:].view(shape).transpose(1, 2)

    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    queries, teacher_queries = tensor(heads, dims[0]), tensor(heads, dims[1])
    keys, teacher_keys = (queries if same else tensor(groups, dims[0])), tensor(groups, dims[1])
    rows = AttentionRows(
        queries, keys, teacher_queries, teacher_keys, mask, mask, causal, 0.1, 0.2, None, reduce=True, same=same
    )
    _, state, scale = attention.forward(rows)
    attention.backward(rows, state, scale, torch.ones(()), (True, True))


def _report(compiled: list[tuple[str, Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    reports = []
    for name, kernel, _ in compiled:
        usage, sass = (_cuobjdump(kernel.asm["cubin"], option) for option in ("--dump-resource-usage", "--dump-sass"))
        opcodes = [words[0] for words in _instructions(sass)]
        reports.append(
            {
                "name": name,
                "registers": _field(usage, "REG"),
                "stack": _field(usage, "STACK"),
                "local": _field(usage, "LOCAL"),
                "shared": kernel.metadata.shared,
                "spills": sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
                "opcodes": dict(
                    collections.Counter(
                        opcode for opcode in opcodes if "MMA" in opcode or "LDG" in opcode or opcode == "FFMA"
                    )
                ),
            }
        )
    return reports


def _instructions(sass: str) -> list[list[str]]:
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", sass)
    return [text.split() for text in found]


def _main(task: str, argument: Any) -> object:
    from triton.runtime.driver import driver

    driver.set_active(NoDevice(90))
    compiled = _compile_instead_of_launching()
    if task == "report":
        reports = {}
        for architecture, name in argument:
            driver.set_active(NoDevice(architecture))
            compiled.clear()
            _call(**CALLS[name])
            reports[_ids((architecture, name))] = _report(compiled)
        return reports
    kernels: dict[str, set[int]] = collections.defaultdict(set)
    for call in argument:
        _call(**call)
    for name, kernel, _ in compiled:
        kernels[name].add(id(kernel))
    return {name: len(binaries) for name, binaries in kernels.items()}


if __name__ == "__main__":
    json.dump(_main(sys.argv[1], json.loads(sys.argv[2])), sys.stdout)
