"""The CUDA kernels of int8 linear layers on a real GPU: the bits of the reference on the CPU.

    python bench/gpu_int8_checks.py

The exit status is 2 where these kernels cannot run: nobody stands in for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gate import Wrong  # noqa: E402
from bench.gpu_relation_checks import DTYPES  # noqa: E402
from bench.gpu_report import CANNOT_RUN, run_all, waiting_is_an_error  # noqa: E402
from fastkd import _int8_operators  # noqa: E402
from fastkd._int8 import ACTIVATIONS  # noqa: E402

# Rows, terms and columns, so that every kernel has some: blocks that quantise, rows quantised before, parts of rows,
# small and large tiles, rows of weights that begin anywhere.
SHAPES = {
    "cuda": (
        *((1, 1, 1), (1, 4096, 4096), (3, 100, 33), (4, 5000, 200), (2, 37, 1000)),
        *((5, 64, 16), (16, 4097, 129), (9, 4096, 1030), (16, 20000, 48), (2, 20000, 48)),
        *((17, 64, 64), (65, 640, 300), (64, 4096, 512), (130, 33, 130), (100, 3001, 70)),
        *((1500, 256, 2050), (2000, 1000, 1100), (1030, 130, 1040)),
    ),
    "cpu": ((1, 1, 1), (3, 100, 33), (17, 64, 65)),
}
LONG = 1 << 17  # terms whose sum is the largest that 32 bits hold
Layer = Callable[..., Tensor]


def native(layer: Layer) -> Layer:
    return partial(layer, impl="native")


class Problem(NamedTuple):
    input: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor

    def to(self, device: str) -> Problem:
        """With a gap of NaN between the rows."""
        moved = Problem(*(tensor.to(device) for tensor in self))
        with_gap = torch.nn.functional.pad(moved.input, (0, 8), value=torch.nan)
        return moved._replace(input=with_gap[:, : self.input.shape[1]])


def problem(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Problem:
    """Rows of all sizes."""
    rows, terms, columns = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = 10 ** (3 * normal(rows, 1).clamp(-1, 1))
    input = (normal(rows, terms) * sizes).to(dtype)
    weight = torch.randint(-128, 128, (columns, terms), dtype=torch.int8, generator=generator)
    scale = torch.rand(columns, generator=generator) * 0.01 + 1e-4
    return Problem(input, weight, scale, normal(columns), normal(rows, columns).to(dtype))


def reference(p: Problem, activation: str, step: Tensor | None = None) -> Tensor:
    p, step = p.to("cpu"), None if step is None else step.cpu()
    return run(partial(_int8_operators.linear, impl="reference"), p, activation, step)


def run(layer: Layer, p: Problem, activation: str = "relu", step: Tensor | None = None) -> Tensor:
    options = {"input_scale": step, "activation": activation, "residual": p.residual}
    return layer(p.input, p.weight, p.scale, p.bias, **options)


def numbers(device: str, dtype: torch.dtype, of: Callable[[Layer], Layer] = native) -> None:
    for shape in SHAPES[device]:
        p = problem(shape, dtype)
        on_device = p.to(device)
        for activation, step in (("none", None), ("relu", torch.tensor(0.03))):
            given = None if step is None else step.to(device)
            got = run(of(_int8_operators.linear), on_device, activation, given)
            want = reference(p, activation, step)
            differ = int((got.cpu() != want).sum())
            if differ:
                raise Wrong(f"{shape}, {activation}: {differ} of {want.numel()} numbers are not the reference's")


def activations(device: str, dtype: torch.dtype, of: Callable[[Layer], Layer] = native) -> None:
    """Two roundings of float32 beside the reference's, and the last one; some numbers are far out on either side."""
    p = problem((40, 300, 500), dtype)
    for activation in ACTIVATIONS:
        got, want = run(of(_int8_operators.linear), p.to(device), activation).cpu(), reference(p, activation)
        allowed = 2 * torch.finfo(dtype).eps * want.double().abs() + 1e-6 * reference(p, "none").double().abs().clamp(
            max=20
        )
        worst = float(((got.double() - want.double()).abs() / allowed.clamp(min=1e-30)).nan_to_num(torch.inf).amax())
        if worst > 1:
            raise Wrong(f"{activation}: off by {worst:.1f} times what is allowed")


def long_sums(device: str, of: Callable[[Layer], Layer] = native) -> None:
    """The largest numbers, in the longest row of one sum, and in longer ones."""
    for rows, terms in ((1, LONG), (5, LONG), (3, LONG + 16), (20, 2 * LONG + 1)):
        x, w = torch.full((rows, terms), 127.0, device=device), torch.full((40, terms), -128, dtype=torch.int8)
        w[1, terms // 2 :] = 127
        step = torch.ones((), device=device)
        got = of(_int8_operators.linear)(x, w.to(device), torch.ones(40, device=device), input_scale=step)
        want = (127 * w.sum(1, dtype=torch.int64)).float().expand(rows, 40)
        if not torch.equal(got.cpu(), want):
            raise Wrong(f"{rows} rows of {terms}: the sums are not exact")


def not_finite(device: str, of: Callable[[Layer], Layer] = native) -> None:
    """A row that is not is NaN, and harms no other; so is everything for a scale that is none."""
    for rows in (3, 12, 70):
        p = problem((rows, 130, 90), torch.float32).to(device)
        clean = run(of(_int8_operators.linear), p)
        for wrong in (torch.nan, -torch.inf):
            broken = p.input.clone()
            broken[1, 129] = wrong
            got = run(of(_int8_operators.linear), p._replace(input=broken))
            others = torch.arange(rows, device=device) != 1
            if not (bool(got[1].isnan().all()) and torch.equal(got[others], clean[others])):
                raise Wrong(f"{rows} rows, {wrong}: that row, and no other, must be NaN")
        for step in (0.0, torch.nan) if device == "cuda" else ():
            if not bool(run(of(_int8_operators.linear), p, step=torch.tensor(step, device=device)).isnan().all()):
                raise Wrong(f"{rows} rows, a scale of {step}: must be NaN")


def same_bits(device: str, of: Callable[[Layer], Layer] = native) -> None:
    for shape in ((4, 500, 300), (16, 500, 300), (64, 4096, 128), (300, 500, 300)):
        p = problem(shape, torch.float32).to(device)
        if not torch.equal(*(run(of(_int8_operators.linear), p, "gelu") for _ in range(2))):
            raise Wrong(f"{shape}: the numbers differ from call to call")


FEW_AND_MANY = ((2, 512, 512), (10, 512, 512), (48, 4096, 256), (512, 512, 2048))
layer = native(_int8_operators.linear)


def no_waiting() -> None:
    for shape in FEW_AND_MANY:
        step = partial(run, layer, problem(shape, torch.bfloat16).to("cuda"), step=torch.tensor(0.1, device="cuda"))
        step()
        with waiting_is_an_error():
            step()


def cuda_graph() -> None:
    """Captured, and replayed on other data: the bits of an eager call."""
    for shape in FEW_AND_MANY:
        p, other = problem(shape, torch.bfloat16).to("cuda"), problem(shape, torch.bfloat16, seed=1).to("cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(layer, p)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(layer, p)
        for tensor, new in zip(p, other, strict=True):
            tensor.copy_(new)
        graph.replay()
        if not torch.equal(captured, run(layer, other)):
            raise Wrong(f"{shape}: a replay differs from an eager call")


def another_stream() -> None:
    """What is computed on a stream is ordered there: its input comes late, and nobody waits for it by hand."""
    for shape in FEW_AND_MANY:
        p = problem(shape, torch.bfloat16).to("cuda")
        want, late = run(layer, p), torch.zeros_like(p.input)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # some 30 ms
            late.copy_(p.input)
            got = run(layer, p._replace(input=late))
        torch.cuda.current_stream().wait_stream(stream)
        if not torch.equal(got, want):
            raise Wrong(f"{shape}: the numbers of another stream differ")


def another_device() -> None:
    """Where there is one: of its tensors, while the first device is the current one."""
    for index in range(1, torch.cuda.device_count()):
        for shape in FEW_AND_MANY:
            p = problem(shape, torch.bfloat16)
            got = run(layer, p.to(f"cuda:{index}"))
            if torch.cuda.current_device() != 0:
                raise Wrong(f"{shape}: the current device changed")
            if not torch.equal(got.cpu(), run(layer, p.to("cuda:0")).cpu()):
                raise Wrong(f"{shape}: the numbers of another device differ")


def checks(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        found[f"int8 {name}"] = partial(numbers, device, dtype)
        found[f"int8 activations {name}"] = partial(activations, device, dtype)
    for check in (long_sums, not_finite, same_bits):
        found[f"int8 {check.__name__.replace('_', ' ')}"] = partial(check, device)
    if device == "cuda":
        for alone in (no_waiting, cuda_graph, another_stream, another_device):
            found[f"int8 {alone.__name__.replace('_', ' ')}"] = alone
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return CANNOT_RUN
    try:
        run(layer, problem((1, 1, 1), torch.float32).to("cuda"))
    except RuntimeError as error:  # a pin that is refused says why
        print(f"the CUDA kernels cannot run here: {error}")
        return CANNOT_RUN
    return run_all(checks("cuda", DTYPES))


if __name__ == "__main__":
    raise SystemExit(main())
