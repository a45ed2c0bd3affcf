"""The CUDA kernels of the losses of distances and angles on a real GPU, against the float64 reference.

    python bench/gpu_relation_checks.py

The exit status is 2 where these kernels cannot run: nobody stands in for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastkd  # noqa: E402
from bench.gate import Wrong  # noqa: E402
from bench.gpu_report import CANNOT_RUN, run_all, waiting_is_an_error  # noqa: E402
from fastkd.testing import exact_and_error  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows and dimensions: a row of a tile alone, edges of tiles, several slabs of anchors.
SIZES = {"cuda": ((1, 3), (2, 5), (33, 7), (64, 128), (257, 96), (1500, 64)), "cpu": ((1, 3), (2, 5), (33, 7))}
FEW = 100  # rows, of which the reference makes N^3 numbers on the CPU
RELATIVE = 1e-5  # the bar for more, against closed forms in float64 on the same device
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {"distance": fastkd.rkd_distance_loss, "angle": fastkd.rkd_angle_loss}


def native(loss: Loss) -> Loss:
    return _pinned(loss, "native")


def rows(n: int, d: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher; of many rows two are close."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(n, d, generator=generator), torch.randn(n, d + 1, generator=generator)
    if n > 8:
        student[n - 1] = student[3] + 2.0**-12
        teacher[n - 2] = teacher[1]
    return student.to(device, dtype), teacher.to(device, dtype)


def run(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach().reshape(1), grad


def numbers(device: str, dtype: torch.dtype, of: Callable[[Loss], Loss] = native) -> None:
    """A few rows by the bar of :mod:`fastkd.testing`, against the reference on the CPU."""
    for name, loss in LOSSES.items():
        for n, d in SIZES[device]:
            student, teacher = rows(n, d, device, dtype)
            got = run(of(loss), student, teacher)
            if n <= FEW:
                exact, error = exact_and_error(partial(run, _pinned(loss, "reference")), student.cpu(), teacher.cpu())
                bounds = [256 * e.reshape(-1, *[1] * (x.ndim - 1)) for x, e in zip(exact, error, strict=True)]
            else:
                exact = run(_pinned(loss, "algebra"), student.double(), teacher.double())
                bounds = [RELATIVE * x.abs().amax() for x in exact]
            for what, one, want, bound in zip(("loss", "gradient"), got, exact, bounds, strict=True):
                allowed = torch.finfo(one.dtype).eps * want.abs() + bound + 1e-45
                worst = float(((one.to(want.device).double() - want).abs() / allowed).nan_to_num(torch.inf).amax())
                if worst > 1:
                    raise Wrong(f"{name}, {n} rows: the {what} is off by {worst:.1f} times what is allowed")


def _pinned(loss: Loss, impl: str) -> Loss:
    return partial(loss, impl=impl)


def same_bits(device: str, of: Callable[[Loss], Loss] = native) -> None:
    for name, loss in LOSSES.items():
        for n in (33, 300) if device == "cuda" else (33,):
            first, second = (run(of(loss), *rows(n, 40, device)) for _ in range(2))
            if not all(map(torch.equal, first, second)):
                raise Wrong(f"{name}, {n} rows: the numbers differ from call to call")


def equal_models(device: str, of: Callable[[Loss], Loss] = native) -> None:
    """A student equal to its teacher: exactly 0, whatever the compiler makes of the differences."""
    for name, loss in LOSSES.items():
        student, _ = rows(70, 9, device)
        for what, one in zip(("loss", "gradient"), run(of(loss), student, student.clone()), strict=True):
            if bool(one.any()):
                raise Wrong(f"{name}: the {what} of equal models must be 0, got up to {float(one.abs().amax()):.1e}")


def no_waiting() -> None:
    for loss in LOSSES.values():
        step = partial(run, native(loss), *rows(128, 64, "cuda"))
        step()
        with waiting_is_an_error():
            step()


def cuda_graph() -> None:
    """Captured, and replayed on other data: the bits of an eager call."""
    for name, loss in LOSSES.items():
        tensors, others = rows(200, 48, "cuda"), rows(200, 48, "cuda", seed=1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(native(loss), *tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(native(loss), *tensors)
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)
        graph.replay()
        if not all(map(torch.equal, captured, run(native(loss), *others))):
            raise Wrong(f"{name}: a replay differs from an eager call")


def another_stream() -> None:
    """What is computed on a stream is ordered there: its input comes late, and nobody waits for it by hand."""
    for name, loss in LOSSES.items():
        student, teacher = rows(150, 32, "cuda")
        want = run(native(loss), student, teacher)
        late = torch.zeros_like(student)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # some 30 ms
            late.copy_(student)
            got = run(native(loss), late, teacher)
        torch.cuda.current_stream().wait_stream(stream)
        if not all(map(torch.equal, got, want)):
            raise Wrong(f"{name}: the numbers of another stream differ")


def another_device() -> None:
    """Where there is one: of its tensors, while the first device is the current one."""
    for index in range(1, torch.cuda.device_count()):
        for name, loss in LOSSES.items():
            want = run(native(loss), *rows(90, 20, "cuda:0"))
            got = run(native(loss), *rows(90, 20, f"cuda:{index}"))
            if torch.cuda.current_device() != 0:
                raise Wrong(f"{name}: the current device changed")
            for one, other in zip(want, got, strict=True):
                torch.testing.assert_close(other.to(one.device), one, rtol=1e-6, atol=1e-9)


def checks(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for dtype in dtypes:
        found[f"relations {str(dtype).removeprefix('torch.')}"] = partial(numbers, device, dtype)
    found["relations same bits"] = partial(same_bits, device)
    found["relations equal models"] = partial(equal_models, device)
    if device == "cuda":
        for check in (no_waiting, cuda_graph, another_stream, another_device):
            found[f"relations {check.__name__.replace('_', ' ')}"] = check
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return CANNOT_RUN
    try:
        run(native(fastkd.rkd_angle_loss), *rows(2, 3, "cuda"))
    except RuntimeError as error:  # a pin that is refused says why
        print(f"the CUDA kernels cannot run here: {error}")
        return CANNOT_RUN
    return run_all(checks("cuda", DTYPES))


if __name__ == "__main__":
    raise SystemExit(main())
