"""What users call, on the CUDA kernels: tensors of the CPU, and the machine of tests/cuda_on_cpu in the GPU's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emulation import MARKS, Machine
from feature_problems import call, flat, judge
from pair_problems import ADVERSARIAL
from test_rkd import LOSSES, Loss, each_loss

import fastkd
from fastkd import _dispatch, native
from fastkd.native import _pairs_cuda, distance, rkd

pytestmark = MARKS


@pytest.fixture
def machine(cuda_on_cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """``impl="native"`` takes the CUDA kernels."""
    cuda_on_cpu.forget()
    monkeypatch.setattr(_pairs_cuda, "_C", cuda_on_cpu)
    monkeypatch.setattr(_pairs_cuda, "_on", lambda device: nullcontext(0))
    for piece in ("squares", "pull"):
        monkeypatch.setattr(distance, piece, getattr(_pairs_cuda, piece))
    for kind in LOSSES:
        name = f"rkd_{kind}_loss"
        monkeypatch.setattr(rkd, name, getattr(_pairs_cuda, name))
    return cuda_on_cpu


@each_loss
@pytest.mark.parametrize("problem", ADVERSARIAL)
def test_adversarial(machine: Machine, loss: Loss, naive: Loss, problem: str) -> None:
    student, teacher = ADVERSARIAL[problem]()
    judge(loss, naive, student, teacher, impl="native")
    assert machine.launches() > 0 or len(student) == 0
    assert machine.reports() == []


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(machine: Machine, loss: Loss, naive: Loss, dtype: torch.dtype) -> None:
    judge(loss, naive, flat(40, 6).to(dtype), flat(40, 5, 1).to(dtype), impl="native")


@each_loss
def test_the_same_as_on_the_cpu(machine: Machine, loss: Loss, naive: Loss) -> None:
    """With every option; layouts; a teacher that was prepared; no gradient."""
    student, teacher = flat(20, 8), flat(20, 5, 1)
    for options in ({"normalize_rows": True, "delta": 0.2}, {"reduction": "sum"}, {}):
        value, grad = call(loss, student, teacher, impl="native", **options)
        want, slope = call(loss, student, teacher, impl="algebra", **options)
        torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))
    strided, taught = student.T.contiguous().T, fastkd.prepare_teacher(teacher)
    for _ in range(2):
        assert torch.equal(call(loss, strided, taught, impl="native")[1], grad)
    launches = machine.launches()
    with torch.no_grad():
        assert torch.equal(loss(student, taught, impl="native"), value)
    # The student's distances, and then three; or for angles two, the angles, and the sum. The teacher's are kept.
    assert machine.launches() - launches == (4 if loss is fastkd.rkd_distance_loss else 5)


@each_loss
def test_rows_of_nan_and_no_rows(machine: Machine, loss: Loss, naive: Loss) -> None:
    for side in (0, 1):
        for value in (torch.nan, torch.inf):
            pair = [flat(6, 3), flat(6, 4, 1)]
            pair[side][2, 1] = value
            assert loss(*pair, impl="native").isnan()
    value, grad = call(loss, flat(0, 3), flat(0, 4), impl="native")
    assert value == 0
    assert grad.shape == (0, 3)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(33, None, 5), (33, 7, 40), (1, 65, 3), (0, 4, 3), (3, 4, 0)], ids=str)
def test_pairwise_distance(machine: Machine, shape: tuple[int, int | None, int], squared: bool) -> None:
    """As exact as in C++, of close rows too, for one batch and for two."""
    n, m, d = shape
    x = flat(n, d)
    y = None if m is None else flat(m, d, 1)
    if n > 8 and d > 3:
        x[8], x[8, 1] = x[3], x[3, 1] + 2.0**-20
    leaves = [tensor.requires_grad_() for tensor in (x, y) if tensor is not None]
    weights = flat(n, n if m is None else m, 2)
    results = []
    for impl in ("native", "algebra"):
        matrix = fastkd.pairwise_distance(x, y, squared=squared, impl=impl)
        results.append((matrix, *torch.autograd.grad(matrix, leaves, weights)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert machine.launches() > 0 or x.numel() == 0


def test_the_current_stream_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        seen.append(("enter", which))
        yield
        seen.append("leave")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda which: SimpleNamespace(cuda_stream=(7, which)))
    where = torch.device("cuda", 1)
    with _pairs_cuda._on(where) as stream:
        assert stream == (7, where)
        assert seen == [("enter", where)]
    assert seen[1:] == ["leave"]


@pytest.mark.parametrize(
    ("architectures", "cuda", "count", "capability", "reason"),
    [
        ("80,90,100,120", "13.0", 1, (9, 0), None),
        ("80,90,100,120", "13.0", 1, (8, 6), None),
        ("80,90,100,120", "13.0", 1, (12, 1), None),
        ("80,90,100,120", "13.0", 1, (13, 0), None),
        ("80,90", "12.6", 1, (10, 0), None),
        ("80,90,100,120", "13.0", 1, (7, 5), "the CUDA kernels are compiled for 80,90,100,120, and this device is 75"),
        (
            "80,90,100,120",
            "13.0",
            1,
            (11, 0),
            "the CUDA kernels are compiled for 80,90,100,120, and this device is 110",
        ),
        ("80,90", "13.0", -35, (9, 0), "the driver is missing, or too old for .* (CUDA error 35)"),
        ("80,90", None, 1, (9, 0), "this torch is not built for CUDA"),
        ("", "13.0", 1, (9, 0), "the C++ extension was built without CUDA"),
    ],
)
def test_who_may_take_them(
    architectures: str,
    cuda: str | None,
    count: int,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extension = SimpleNamespace(cuda_architectures=architectures, cuda_device_count=lambda: count)
    monkeypatch.setattr(native, "_extension", extension)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device, dtypes = torch.device("cuda", 0), (torch.bfloat16, torch.float32)
    for op in ("rkd_distance_loss", "rkd_angle_loss", "pairwise_distance"):
        refusal = _dispatch._refusal(op, "native", device, dtypes)
        assert (refusal is None) == (reason is None), refusal
        assert reason is None or all(part in refusal for part in reason.split(" .* "))
        wide = _dispatch._refusal(op, "native", device, (torch.float64,))
        assert wide == "no kernel computes float64"
    on_cuda = "the tensors are on cuda, the C++ kernels run on the CPU"
    assert _dispatch._refusal("kd_loss", "native", device, dtypes) == on_cuda


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_reason", "it is gone")
    assert _dispatch._refusal("rkd_angle_loss", "native", torch.device("cuda", 0), (torch.float32,)) == "it is gone"
