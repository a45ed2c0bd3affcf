"""The machine that stands in for a GPU: it computes as CUDA does, and sees what a GPU may let pass."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import MARKS, Machine

pytestmark = MARKS
BLOCKS, THREADS = 2, 64
# tests/cuda_on_cpu/faults.h, in its order -> what is said
FAULTS = {
    "reverse": None,
    "no barrier": "read what nobody wrote",
    "some barrier": "threads wait for others that do not come",
    "unwritten": "read what nobody wrote",
    "write after read": "write what another thread reads",
    "write beyond": "write out of bounds",
    "read beyond": "read out of bounds",
    "two writers": "two threads write",
    "read of another's": "read what another thread writes",
    "blocks": "what another thread",  # writes, or reads
    "sum": None,
    "some lanes": "threads wait for others that do not come",
    "misaligned": "misaligned access",
    "copy": None,
    "no wait": "read what is being copied",
    "no barrier after wait": "read what",  # another thread writes, or nobody wrote
    "copy over read": "what another thread",  # reads, or writes
    "copy over copy": "write what is being copied",
    "end before copy": "a thread ends before its copies",
    "misaligned copy": "misaligned access",
    "copy beyond": "read out of bounds",
}


def run(machine: Machine, fault: str, seed: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    given = torch.randint(0, 9, (BLOCKS, THREADS)).float()
    out = torch.empty(BLOCKS, THREADS)
    with machine.order(seed):
        found = machine.run("run_fault", list(FAULTS).index(fault), given, out, BLOCKS, THREADS, outputs=[out])
    return found, given, out


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_seen(cuda_on_cpu: Machine, fault: str, seed: int) -> None:
    said = FAULTS[fault]
    if fault == "write beyond":
        with pytest.raises(AssertionError, match="run_fault wrote beyond a tensor of shape"):
            run(cuda_on_cpu, fault, seed)
        assert said in cuda_on_cpu.reports()[0]
        return
    found, _, _ = run(cuda_on_cpu, fault, seed)
    assert (found == []) if said is None else any(said in line for line in found), found


def test_it_computes(cuda_on_cpu: Machine) -> None:
    for seed in (0, 1):
        _, given, out = run(cuda_on_cpu, "reverse", seed)
        assert torch.equal(out, given.flip(1))
        _, given, out = run(cuda_on_cpu, "copy", seed)
        assert torch.equal(out, given.flip(1))
        _, given, out = run(cuda_on_cpu, "sum", seed)
        of_warps = given.reshape(BLOCKS, 2, 32).sum(-1, keepdim=True).expand(-1, -1, 32)
        first_votes = torch.tensor([1.0, 0.0]).reshape(1, 2, 1)  # lane 0 is thread 0, and thread 32
        assert torch.equal(out.reshape(BLOCKS, 2, 32), of_warps + first_votes)


def test_a_report_says_where(cuda_on_cpu: Machine) -> None:
    found, _, _ = run(cuda_on_cpu, "read beyond", 0)
    assert found == ["block (0, 0, 0) thread 0: read out of bounds, 4 bytes, buffer 0 of 512 bytes + -4"]


@pytest.mark.parametrize(("blocks", "threads"), [(0, 64), (2**31, 64), (1, 0), (1, 1025)])
def test_a_launch_that_cuda_refuses_is_refused(cuda_on_cpu: Machine, blocks: int, threads: int) -> None:
    assert cuda_on_cpu.run_fault(0, 0, 0, blocks, threads) == 9  # cudaErrorInvalidConfiguration
