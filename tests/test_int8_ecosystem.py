"""int8 layers where people use them: compiled, exported, under autocast, in threads; and their packed weights."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8_problems import flat, int8, scales, weights
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import native

IMPLEMENTATIONS = ("reference", "native")
W, SCALE, BIAS = weights(20, 12), scales(20), flat(20)
KERNEL = weights(20, 12, 3, 3)
NO_GRADIENT = "there is no gradient through int8 layers: call them under torch.no_grad()"

CALLS: dict[str, Any] = {
    "int8_linear": lambda x, impl: int8.linear(x, W, SCALE, BIAS, impl=impl),
    "int8_weight_only_linear": lambda x, impl: int8.weight_only_linear(x, W, SCALE, BIAS, impl=impl),
    "int8_conv2d": lambda x, impl: int8.conv2d(
        x.unflatten(-1, (12, 1, 1)), KERNEL, SCALE, padding=1, input_scale=torch.tensor(0.1), impl=impl
    ),
    "int8_embedding": lambda x, impl: int8.embedding(
        x[..., 0].abs().to(torch.int64), W, SCALE, dtype=x.dtype, impl=impl
    ),
}
calls = pytest.mark.parametrize("op", CALLS)


@calls
def test_compile(impl: str, op: str) -> None:
    x = flat(6, 12)
    compiled = torch.compile(lambda x: CALLS[op](x * 2, impl) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), CALLS[op](x * 2, impl) + 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own
def test_compile_to_code() -> None:
    x, model = flat(6, 12), Layers()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@calls
def test_rows_of_a_compiled_graph_follow_the_batch(impl: str, op: str) -> None:
    compiled = torch.compile(lambda x: CALLS[op](x, impl), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(flat(4, 12))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (5, 17):
            assert torch.equal(compiled(flat(rows, 12)), CALLS[op](flat(rows, 12), impl))


class Layers(torch.nn.Module):
    """Weights as buffers, which an exported program owns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", W.clone())
        self.register_buffer("kernel", KERNEL.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = int8.linear(x, self.weight, SCALE, BIAS)[:, :12]
        return int8.conv2d(y.unflatten(-1, (12, 1, 1)), self.kernel, SCALE, padding=1, activation="relu")


def test_export() -> None:
    model = Layers()
    program = torch.export.export(model, (flat(4, 12),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fastkd.int8_" in name for name in names) == 2
    for rows in (2, 9):
        assert torch.equal(program.module()(flat(rows, 12)), model(flat(rows, 12)))


def test_the_operators_are_what_they_say() -> None:
    x, image = flat(6, 12), flat(2, 12, 5, 6).to(memory_format=torch.channels_last)
    ops, window = torch.ops.fastkd, ((2, 1), (1, 0), (1, 1), 1)
    for op, arguments in (
        (ops.int8_linear, (x, W, SCALE, BIAS, None, None, "relu", None)),
        (ops.int8_weight_only_linear, (x, W, SCALE, None, None, "none", None)),
        (ops.int8_conv2d, (image, KERNEL, SCALE, None, None, None, "none", *window, None)),
        (ops.int8_embedding, (torch.tensor([3, 1]), W, SCALE, torch.bfloat16, None)),
    ):
        torch.library.opcheck(op, arguments)


@calls
def test_autocast_changes_nothing(impl: str, op: str) -> None:
    want = CALLS[op](flat(6, 12), impl)
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[op](flat(6, 12), impl)
    assert got.dtype is torch.float32
    assert torch.equal(got, want)


@calls
def test_without_gradients(impl: str, op: str) -> None:
    x = flat(6, 12)
    want = CALLS[op](x, impl)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(CALLS[op](x.clone().requires_grad_(), impl), want)


@pytest.mark.parametrize("op", [op for op in CALLS if op != "int8_embedding"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_refused_when_it_is_asked_for(impl: str, op: str, compiled: bool) -> None:
    """Not before: a model that runs without no_grad() may never ask."""
    call = torch.compile(CALLS[op], fullgraph=True, backend="aot_eager") if compiled else CALLS[op]
    output = call(flat(6, 12).requires_grad_(), impl)
    assert torch.equal(output, CALLS[op](flat(6, 12), impl))
    with pytest.raises(RuntimeError, match=f"^{op}: {NO_GRADIENT}$".replace("(", r"\(").replace(")", r"\)")):
        output.sum().backward()


def test_a_gradient_of_the_residual_is_refused_too(impl: str) -> None:
    residual = flat(6, 20).requires_grad_()
    output = int8.linear(flat(6, 12), W, SCALE, residual=residual, impl=impl)
    with pytest.raises(RuntimeError, match="int8_linear: there is no gradient"):
        output.sum().backward()


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda call, x: torch.func.vmap(call)(x.unflatten(0, (3, 2))),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
    "jacrev": lambda call, x: torch.func.jacrev(call)(x),
    "a constant": lambda call, x: torch.func.grad(lambda y: (y * call(x).sum()).sum())(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("compiled", [False, True])
@calls
def test_functional_transforms_are_refused(impl: str, op: str, compiled: bool, transform: str) -> None:
    def run(x: Tensor) -> Any:
        return TRANSFORMS[transform](lambda x: CALLS[op](x, impl), x)

    run = torch.compile(run, backend="aot_eager") if compiled else run
    with pytest.raises(RuntimeError, match=f"^{op}: int8 layers do not run inside vmap, grad, jvp and the like: call "):
        run(flat(6, 12))
    assert CALLS[op](flat(6, 12), impl).shape[0] == 6, "and afterwards all is as before"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("op", [op for op in CALLS if op != "int8_embedding"])
def test_no_derivative_is_dropped_in_forward_mode(impl: str, op: str) -> None:
    x = flat(6, 12)
    with forward_ad.dual_level():
        assert torch.equal(CALLS[op](x, impl), CALLS[op](x.clone(), impl)), "a teacher's input has none"
        with pytest.raises(RuntimeError, match=f"^{op}: there is no gradient through int8 layers, in forward mode ei"):
            CALLS[op](forward_ad.make_dual(x, x.clone()), impl)


packing = pytest.mark.native


def kept() -> Any:
    from fastkd.native import int8_packing

    return int8_packing._kept


@packing
def test_packed_weights_follow_their_weight() -> None:
    w, x = weights(20, 12), flat(6, 12)
    before = len(kept())
    int8.linear(x, w, SCALE, impl="native")
    entry = kept().get(w)
    int8.linear(x, w, SCALE, impl="native")
    assert kept().get(w) is entry is not None, "packed once"
    w[3] = 5
    assert torch.equal(int8.linear(x, w, SCALE, impl="native"), int8.linear(x, w, SCALE, impl="reference"))
    assert kept().get(w) is not entry
    twin = copy.deepcopy(w)
    twin.zero_()
    assert int8.linear(x, twin, SCALE, impl="native").count_nonzero() == 0
    assert torch.equal(int8.linear(x, w, SCALE, impl="native"), int8.linear(x, w, SCALE, impl="reference"))
    w.set_(weights(20, 12, seed=9))
    assert torch.equal(int8.linear(x, w, SCALE, impl="native"), int8.linear(x, w, SCALE, impl="reference"))
    assert len(kept()) == before + 2
    del w, twin, entry
    gc.collect()
    assert len(kept()) == before


@packing
def test_one_weight_in_two_layers() -> None:
    """A linear layer's and a convolution's, whose packed weights differ."""
    w, x = weights(20, 12), flat(6, 12)
    kernel = w.view(20, 12, 1, 1)
    for _ in range(2):
        linear = int8.linear(x, w, SCALE, input_scale=torch.tensor(0.1), impl="native")
        conv = int8.conv2d(x.view(6, 12, 1, 1), kernel, SCALE, input_scale=torch.tensor(0.1), impl="native")
        assert torch.equal(linear, conv.view(6, 20))


@packing
def test_weights_of_inference_mode() -> None:
    """They have no version: nobody could tell that they were written to."""
    with torch.inference_mode():
        w, x = weights(20, 12), flat(6, 12)
        for _ in range(2):
            assert torch.equal(int8.linear(x, w, SCALE, impl="native"), int8.linear(x, w, SCALE, impl="reference"))
            w.neg_()
    plain = weights(20, 12)
    with torch.inference_mode():
        before = int8.linear(flat(6, 12), plain, SCALE, impl="native")
        plain.neg_().bitwise_not_()
        after = int8.linear(flat(6, 12), plain, SCALE, impl="native")
    assert not torch.equal(before, after)


@packing
def test_many_threads_at_once() -> None:
    w, x = weights(20, 12), flat(6, 12)
    want, results = int8.linear(x, weights(20, 12), SCALE, impl="reference"), []
    barrier = threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        results.append([int8.linear(x, w, SCALE, impl="native") for _ in range(20)])

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(got, want) for result in results for got in result)


SCRIPT = """
import array, importlib.util as u, sys
spec = u.spec_from_file_location("_C", sys.argv[1]); C = u.module_from_spec(spec); spec.loader.exec_module(C)
rows, terms, columns, shape = 5, 37, 50, (50, 37, 1, 1, 1)
address = lambda a: a.buffer_info()[0]
x = array.array("f", [((i * 7919) % 1009 - 500) / 97 for i in range(rows * terms)])
w = array.array("b", [(i * 104729) % 256 - 128 for i in range(columns * terms)])
scale = array.array("f", [(i % 7 + 1) / 3000 for i in range(columns)])
packed = array.array("b", bytes(C.int8_packed_bytes(shape)))
C.int8_pack(shape, address(w), address(packed), 1)
for activation in range(5):
    out = array.array("f", bytes(4 * rows * columns))
    numbers = (address(x), 0, address(out), 1, 0, 0, address(packed), address(scale), 0, activation)
    assert C.int8_linear(shape, numbers + (rows, terms, columns))
    print(out.tobytes().hex())
"""


@pytest.mark.native
def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of activations too. Each runs in a process of its own, which needs no torch."""
    results = {}
    for name in ("avx512vnni", "avx512", "avx2", "generic"):
        monkeypatch.setenv("FASTKD_CPU_ISA", name)
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, native.extension().__file__], capture_output=True, text=True
        )
        if run.returncode == 0:
            results[name] = run.stdout
        else:
            assert "does not have it" in run.stderr or "must be one of" in run.stderr, run.stderr
    assert len(set(results.values())) == 1
    assert len(results["generic"].split()) == len(set(results["generic"].split())) == 5
