"""Losses over heads where people use them: autocast, checkpointing, several processes, sharded parameters."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_problems import device_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import Head

pytestmark = pytest.mark.few_interpreted(3)  # a graph is the same whoever computes; kernels have tests of their own
N, H, V = 5, 6, 37


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def parameters(impl: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device_of(impl)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(impl: str, dtype: torch.dtype, reduction: str) -> None:
    """Hidden states come out of autocast in 16 bits, the weight is a float32 parameter and has a float32 gradient."""
    device = device_of(impl)
    first, weight, teacher = parameters(impl, (H, 3), (V, H), (N, V))
    inputs = torch.randn(N, 3, device=device)
    with torch.autocast(device, dtype=dtype):
        hidden = F.linear(inputs, first)
        assert hidden.dtype is dtype
        loss = fastkd.kd_loss(Head(hidden, weight), teacher, reduction=reduction, impl=impl).sum()
    assert loss.dtype is torch.float32
    for _ in range(2):  # backward runs outside autocast, by all advice
        got = torch.autograd.grad(loss, (first, weight), retain_graph=True)
    assert [x.dtype for x in got] == [torch.float32] * 2
    exact = fastkd.kd_loss(F.linear(hidden.float(), weight), teacher, reduction=reduction, impl=impl).sum()
    want = torch.autograd.grad(exact, (first, weight))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if device == "cpu" else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(loss, exact, **tolerance)
    torch.testing.assert_close(got[1], want[1], **tolerance)
    torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)  # through hidden states of 16 bits


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_checkpointing(impl: str, reduction: str, reentrant: bool) -> None:
    leaf, weight, bias, teacher = parameters(impl, (N, H), (V, H), (V,), (N, V))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(torch.tanh(x), weight, bias, workspace=2 * V * 4)
        return fastkd.kd_loss(head, teacher.detach(), reduction=reduction, impl=impl)

    upstream = torch.linspace(1, 2, N, device=leaf.device) if reduction == "none" else None
    leaves = leaf, weight, bias
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward(upstream)
    close([x.grad for x in leaves], list(torch.autograd.grad(loss(*leaves), leaves, upstream)))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_saved_tensors_may_be_moved(impl: str, reduction: str) -> None:
    """Hooks hand back other tensors of the same values: a second backward reads those."""
    hidden, weight, teacher = parameters(impl, (N, H), (V, H), (N, V))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy(force=True), torch.from_numpy):
        loss = fastkd.kd_loss(Head(hidden, weight), teacher, reduction=reduction, impl=impl).sum()
    if device_of(impl) != "cpu":
        pytest.skip("the hooks unpack to the CPU")
    want = torch.autograd.grad(fastkd.kd_loss(F.linear(hidden, weight), teacher, reduction=reduction).sum(), weight)
    for _ in range(2):
        close(torch.autograd.grad(loss, weight, retain_graph=True), want)


def test_gradient_accumulation(impl: str) -> None:
    """Micro-batches under one normalizer add up in the weight's gradient to that of the batch."""
    hidden, weight, teacher = parameters(impl, (N, H), (V, H), (N, V))
    target = torch.tensor([1, -100, 3, 4, 5], device=hidden.device)
    fastkd.kd_loss(Head(hidden, weight), teacher, target, impl=impl).backward()
    want, weight.grad = weight.grad, None
    for part in (slice(0, 2), slice(2, 5)):
        head = Head(hidden[part], weight)
        fastkd.kd_loss(head, teacher[part], target[part], normalizer=(target != -100).sum(), impl=impl).backward()
    close(weight.grad, want)


def test_hooks_and_optimizers_see_plain_gradients(impl: str) -> None:
    """Contiguous, strided as the parameter is, and no part of the graph."""
    hidden, weight, bias, teacher = parameters(impl, (N, H), (V, H), (V,), (N, V))
    seen: list[Tensor] = []
    for x in (hidden, weight, bias):
        x.register_hook(seen.append)
    fastkd.kd_loss(Head(hidden, weight, bias), teacher, impl=impl).backward()
    assert all(x.is_contiguous() and not x.requires_grad for x in seen)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.1)
    optimizer.step()
    assert bool(weight.isfinite().all())


def test_head_of_a_linear_layer(impl: str) -> None:
    layer = nn.Linear(H, V, device=device_of(impl))
    hidden, teacher = torch.randn(N, H, device=device_of(impl)), torch.randn(N, V, device=device_of(impl))
    fastkd.KDLoss(temperature=2.0, impl=impl)(Head(hidden, layer.weight, layer.bias), teacher).backward()
    got, layer.weight.grad = layer.weight.grad, None
    fastkd.kd_loss(layer(hidden), teacher, temperature=2.0, impl=impl).backward()
    close(got, layer.weight.grad)


PROCESS = """
    import sys, warnings
    import torch, torch.distributed as dist
    warnings.filterwarnings("ignore")
    import fastkd
    from fastkd import Head
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, taught, matrix, target = torch.randn(8, 5), torch.randn(8, 3), torch.randn(41, 3), torch.arange(8)
    target[1] = target[6] = target[7] = -100
    def refused(call, *words):
        try:
            call()
        except (TypeError, ValueError) as error:
            assert all(word in str(error) for word in words), str(error)
        else:
            raise AssertionError("not refused")
"""

DDP = """
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 41)
        def forward(self, x, taught, target, normalizer):
            head = Head(torch.tanh(self.first(x)), self.head.weight, self.head.bias, workspace=700)
            return fastkd.kd_loss(head, Head(taught, matrix), target, temperature=2.0, normalizer=normalizer)
    def gradient(model, part, normalizer):
        model.zero_grad()
        model(x[part], taught[part], target[part], normalizer).backward()
        return [p.grad.clone() for p in model.parameters()]
    model = Model()
    want = gradient(model, slice(0, 8), None)
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    count = (target[part] != -100).sum().float()
    dist.all_reduce(count)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        # DDP averages over ranks, so that each rank divides by its share of the global count.
        for a, b in zip(gradient(parallel, part, count / 2), want, strict=True):
            torch.testing.assert_close(a, b)
    dist.destroy_process_group()
    print("equal")
"""

SHARDED = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))
    weight, bias, hidden = torch.randn(41, 5), torch.randn(41), torch.randn(8, 5)
    split = distribute_tensor(weight, mesh, [Shard(0)])
    refused(lambda: Head(hidden, split), "Head: weight must be a whole tensor", "full_tensor()", "DTensor")
    refused(lambda: Head(hidden, weight, distribute_tensor(bias, mesh, [Shard(0)])), "Head: bias must be a whole")
    refused(lambda: Head(distribute_tensor(hidden, mesh, [Shard(0)]), weight), "Head: input must be a whole")

    plain = weight.clone().requires_grad_()
    fastkd.kd_loss(Head(hidden, plain), Head(taught, matrix), target).backward()
    leaf = split.detach().requires_grad_()
    fastkd.kd_loss(Head(hidden, leaf.full_tensor()), Head(taught, matrix), target).backward()
    assert isinstance(leaf.grad, DTensor)
    torch.testing.assert_close(leaf.grad.full_tensor(), plain.grad)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 41)
        def forward(self, x):
            head = Head(torch.tanh(self.first(x)), self.head.weight, self.head.bias)
            return fastkd.kd_loss(head, Head(taught, matrix), target)
    model = Model()
    model(x).backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    fully_shard(model)
    refused(lambda: Head(torch.zeros(8, 6), model.head.weight), "full_tensor()", "FSDP")
    model(x).backward()  # in forward FSDP has gathered them
    for p, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), grad)
    dist.destroy_process_group()
    print("equal")
"""


@pytest.mark.parametrize("code", [DDP, SHARDED], ids=["ddp", "sharded"])
def test_two_processes(code: str, tmp_path: Path) -> None:
    """DDP and gathered shards give the gradients of one process; shards that were not gathered are refused."""
    command = [sys.executable, "-c", textwrap.dedent(PROCESS) + textwrap.dedent(code)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [p.communicate(timeout=240) for p in processes]
    assert all(p.returncode == 0 for p in processes), results[0][1] + results[1][1]
    assert [out.split() for out, _ in results] == [["equal"], ["equal"]]
