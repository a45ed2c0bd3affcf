"""The logit losses where people use them: compiled, exported, under autocast, in language models, over processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import run_python
from torch import Tensor, nn

import fastkd
from fastkd import _dispatch
from fastkd.testing import peaked_logits

N, V = 6, 41
UPSTREAM = {"none": torch.ones(N), "mean": torch.ones(()), "sum": torch.ones(()), "batchmean": torch.ones(())}


def loss_and_grad(loss: Callable[..., Tensor], student: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *args)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("reduction", UPSTREAM)
def test_global_defaults_change_nothing(impl: str, reduction: str) -> None:
    """A default dtype or device is for the tensors that a user makes, not for those that fastkd needs."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    tensors = peaked_logits(N, V), peaked_logits(N, V, seed=1), torch.arange(N), UPSTREAM[reduction]
    student, teacher, target, upstream = (tensor.to(device) for tensor in tensors)

    def run() -> tuple[Tensor, ...]:
        leaf = student.clone().requires_grad_()
        loss, parts = fastkd.kd_loss(
            leaf, teacher, target, temperature=2.0, reduction=reduction, impl=impl, return_parts=True
        )
        loss.backward(upstream)
        assert leaf.grad is not None
        return loss.detach(), leaf.grad, *parts

    want = run()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)  # dtype and device too


def test_compile_as_the_first_call_of_a_process() -> None:
    """fullgraph, value and gradient equal to the eager bits; the batch size may change without a new graph."""
    out = run_python(
        """
        import warnings
        import torch, fastkd
        warnings.filterwarnings("ignore")
        def loss(s, t, y, w):
            return fastkd.kd_loss(s, t, y, divergence="jsd", temperature=2.0, row_weight=w, reduction="mean")
        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        for n in (6, 9, 17):
            s, t = torch.randn(n, 41), torch.randn(n, 41)
            y, w = torch.randint(41, (n,)), torch.rand(n)
            a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
            got, want = compiled(a, t, y, w), loss(b, t, y, w)
            got.backward(); want.backward()
            assert torch.equal(got, want) and torch.equal(a.grad, b.grad), n
        print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
        """
    )
    assert out.split() == ["graphs", "1"]


def test_compile_with_everything(impl: str) -> None:
    """All tensors, several teachers, leading dimensions, parts; inside a compiled model whose logits are no leaf."""
    student, target = torch.randn(2, 3, V), torch.randint(V, (2, 3))
    teachers = [torch.randn(2, 3, V), torch.randn(2, 3, V)]
    weight, temperature, count = torch.rand(2, 3), torch.rand(2, 3) + 0.5, torch.tensor(5.0)
    shares = torch.rand(2, 3, 2)

    def loss(student: Tensor, a: Tensor, b: Tensor) -> Tensor:
        value, parts = fastkd.kd_loss(
            student * 2, [a, b], target, temperature=temperature, teacher_temperature=[1.5, weight + 1],
            alpha=weight, row_weight=weight, teacher_weight=shares, normalizer=count, overwrite_student=True,
            return_parts=True, impl=impl,
        )  # fmt: skip
        return value + parts.soft

    got = loss_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, *teachers)
    want = loss_and_grad(loss, student, *teachers)
    torch.testing.assert_close(got, want)


def test_compiled_rows(impl: str) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        rows = fastkd.kd_loss(student, teacher, reduction="none", dim=1, impl=impl)
        return (rows * torch.arange(rows.numel()).reshape(rows.shape)).sum()

    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    got = loss_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, teacher)
    torch.testing.assert_close(got, loss_and_grad(loss, student, teacher))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own
def test_compiled_rows_of_a_slice(impl: str) -> None:
    """Sliced logits have rows that begin anywhere: the layout a kernel likes for its gradient is not the graph's."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.kd_loss((student * 2)[:, :19], teacher[:, :19], impl=impl)

    student, teacher = torch.randn(4, 21), torch.randn(4, 21)
    got = loss_and_grad(torch.compile(loss, fullgraph=True), student, teacher)
    torch.testing.assert_close(got, loss_and_grad(loss, student, teacher))


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_counts_in_a_compiled_graph_follow_the_batch(reduction: str) -> None:
    """The batch size and an integer normaliser change at every step: one graph for all."""

    def loss(student: Tensor, teacher: Tensor, count: int) -> Tensor:
        normalizer = None if reduction == "batchmean" else count
        return fastkd.kd_loss(student, teacher, reduction=reduction, normalizer=normalizer)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(4, V), torch.randn(4, V), 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (5, 7, 9):
            student, teacher = torch.randn(n, V), torch.randn(n, V)
            torch.testing.assert_close(compiled(student, teacher, n + 3), loss(student, teacher, n + 3))


def test_export() -> None:
    class Criterion(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            return fastkd.kd_loss(student, teacher, target, temperature=2.0)

    args = torch.randn(N, V), torch.randn(N, V), torch.randint(V, (N,))
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(Criterion(), args, dynamic_shapes=[{0: rows}] * 3)
    more = torch.randn(11, V), torch.randn(11, V), torch.randint(V, (11,))
    assert torch.equal(program.module()(*more), Criterion()(*more))
    assert [n.name for n in program.graph.nodes if "fastkd" in str(n.target)] == ["logit_forward"]


@pytest.mark.parametrize("reduce", [True, False])
def test_opcheck(impl: str, reduce: bool) -> None:
    from fastkd.losses import _logit_operators

    student = torch.randn(N, V, requires_grad=True)
    teachers = [torch.randn(N, V), torch.randn(N, V)]
    arguments = (
        student, teachers, torch.arange(N), torch.rand(N), None, 0.3, torch.rand(N) + 0.5, 0.0, [], [1.0, 2.0],
        None, [0.5, 0.5], None, None, "jsd", 0.5, True, 0.1, 0.01, -100, V, reduce, True, False, 0.0, "kd_loss", impl,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastkd.logit_forward.default, arguments)
    loss, state, scale = (x.detach() for x in torch.ops.fastkd.logit_forward(*arguments))
    backward = (torch.ones_like(loss), state, scale, student.detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.fastkd.logit_backward.default, backward)
    assert _logit_operators.LIBRARY is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl: str, dtype: torch.dtype) -> None:
    """Half-precision logits come out of autocast; the loss computes in float32 all the same."""
    hidden, weight, teacher = torch.randn(N, 8), torch.randn(V, 8, requires_grad=True), torch.randn(N, V)
    with torch.autocast("cpu", dtype=dtype):
        logits = F.linear(hidden, weight)
        assert logits.dtype is dtype
        loss = fastkd.kd_loss(logits, teacher, temperature=2.0, impl=impl)
    assert loss.dtype is torch.float32
    want = fastkd.kd_loss(logits.detach().float(), teacher, temperature=2.0, impl=impl)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_shifted_labels_of_a_language_model(impl: str) -> None:
    """(B, T, V) logits of a HuggingFace model with shifted labels equal the sliced logits that people write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(layers: int) -> nn.Module:
        sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))

    student, teacher = model(1), model(2).eval()
    ids = torch.randint(97, (2, 9))
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        teacher_logits = teacher(ids).logits
    logits = student(ids).logits
    loss = fastkd.kd_loss(logits, teacher_logits, labels, temperature=2.0, overwrite_student=True, impl=impl)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    sliced, teacher_sliced = student(ids).logits[:, :-1].reshape(-1, 97), teacher_logits[:, :-1].reshape(-1, 97)
    soft = F.kl_div(
        F.log_softmax(sliced / 2, -1), F.log_softmax(teacher_sliced / 2, -1), log_target=True, reduction="batchmean"
    )
    want = 0.5 * F.cross_entropy(sliced, ids[:, 1:].reshape(-1)) + 0.5 * 4 * soft
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for name, p in student.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing(impl: str) -> None:
    from torch.utils.checkpoint import checkpoint

    student, teacher = torch.randn(N, V), torch.randn(N, V)

    def loss(student: Tensor) -> Tensor:
        return fastkd.kd_loss(student * 2, teacher, impl=impl)

    got = loss_and_grad(lambda s: checkpoint(loss, s, use_reentrant=False), student)
    torch.testing.assert_close(got, loss_and_grad(loss, student))


DDP = """
    import os, sys, warnings
    import torch, torch.distributed as dist
    warnings.filterwarnings("ignore")
    import fastkd
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, teacher, target = torch.randn(8, 5), torch.randn(8, 41), torch.arange(8)
    target[1] = target[6] = target[7] = -100
    model = torch.nn.Linear(5, 41)
    def gradient(model, part, normalizer):
        model.zero_grad()
        fastkd.kd_loss(model(x[part]), teacher[part], target[part], temperature=2.0, normalizer=normalizer).backward()
        return [p.grad.clone() for p in model.parameters()]
    want = gradient(model, slice(0, 8), None)
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    count = (target[part] != -100).sum().float()
    dist.all_reduce(count)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # DDP averages over ranks, so that each rank divides by its share of the global count.
    got = gradient(parallel, part, count / 2)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    dist.destroy_process_group()
    print("equal")
"""


def test_ddp_over_two_processes(tmp_path: Path) -> None:
    """Unequal shards with one global normaliser give the gradient of the whole batch."""
    code = textwrap.dedent(DDP)
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [p.communicate(timeout=240) for p in processes]
    assert all(p.returncode == 0 for p in processes), results[0][1] + results[1][1]
    assert [out.split() for out, _ in results] == [["equal"], ["equal"]]


def test_more_than_2_to_the_31_elements_of_stride(impl: str) -> None:
    """Rows are addressed in 64 bits: here 2**31 elements lie between two rows of a virtual allocation."""
    if impl == "triton" and not torch.cuda.is_available():
        pytest.skip("interpreted: the interpreter has no address arithmetic of its own to get wrong")
    storage = torch.UntypedStorage(2 * (2**31 + 64) * 2 + 4096)  # bfloat16; pages that nobody touches cost nothing
    student = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (2, 64), (2**31 + 64, 1))  # type: ignore[call-overload]
    values, teacher = peaked_logits(2, 64, dtype=torch.bfloat16), peaked_logits(2, 64, seed=1)
    student.copy_(values)
    torch.testing.assert_close(
        fastkd.kd_loss(student, teacher, impl=impl), fastkd.kd_loss(values, teacher, impl=impl), rtol=0, atol=0
    )


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    fastkd.explain("kd_loss", torch.zeros(2, 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kd_loss"
    assert [line.split()[0] for line in lines[1:]] == list(_dispatch.ORDER)
    assert sum("<- runs" in line for line in lines) == 1
    fastkd.explain()
    assert "cross_entropy" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"explain: op must be one of kd_loss, .*, got 'kl'"):
        fastkd.explain("kl")


def test_a_missing_extension_is_said_once_and_the_reference_runs() -> None:
    out = run_python(
        """
        import sys, warnings
        sys.modules["fastkd._C"] = None
        import torch, fastkd
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fastkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
            fastkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
        print(len(said), said[0].category.__name__, "the C++ extension is not built" in str(said[0].message))
        try:
            fastkd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), impl="native")
        except RuntimeError as error:
            print("refused", "the C++ extension is not built" in str(error))
        """
    )
    assert out.splitlines() == ["1 RuntimeWarning True", "refused True"]
