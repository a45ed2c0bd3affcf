"""The Triton kernels on a real GPU, against the float64 reference and against what fastkd promises of every kernel.

    python bench/gpu_checks.py
    python bench/gpu_checks.py --interpret

The first needs a CUDA device (exit status 2 without one). The second runs the small checks on CPU tensors in Triton's
interpreter. One line a check; the exit status is 1 if any failed. No test framework is needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastkd  # noqa: E402
from bench import gate, gpu_attention_checks, gpu_compaction_checks, gpu_head_checks, gpu_teacher_checks  # noqa: E402
from bench.data import as_output, peaked_pair  # noqa: E402
from bench.gate import Wrong  # noqa: E402
from bench.gpu_report import CANNOT_RUN, run_all, waiting_is_an_error  # noqa: E402
from fastkd._rows import DIVERGENCES  # noqa: E402

# What older interpreters of Triton meet in numpy 2.4 and later: they make scalars of arrays with one element.
NUMPY_REFUSES = "only 0-dimensional arrays can be converted to Python scalars"
IGNORED = -100
MIXED = ("forward_kl", "jsd", "tvd")  # kernels of one pass, of two, and one with a kink


@dataclass(frozen=True)
class Setting:
    device: str
    dtypes: tuple[torch.dtype, ...]
    vocabularies: tuple[int, ...]  # smallest, odd tail, and those of today's models
    rows: int = 7
    temperature: float = 2.0


GPU = Setting("cuda", (torch.float32, torch.bfloat16, torch.float16), (2, 257, 50257, 128256, 262144))
INTERPRETER = Setting("cpu", (torch.float32, torch.bfloat16), (2, 257), rows=3)


def kd(student: Tensor, teacher: Tensor, target: Tensor | None, **options: Any) -> Tensor:
    return fastkd.kd_loss(student, teacher, target, impl="triton", **options)


def attention(*tensors: Tensor, **options: Any) -> Tensor:
    return fastkd.attention_kl_loss(*tensors, impl="triton", **options)


def run(student: Tensor, teacher: Tensor, target: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient, under an upstream gradient of 1 for the loss or for each of its rows."""
    leaf = student.detach().requires_grad_()
    loss = kd(leaf, teacher, target, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), grad


def need(condition: object, message: str) -> None:
    if not bool(condition):
        raise Wrong(message)


def strided(logits: Tensor, offset: int) -> Tensor:
    """The same numbers in rows of odd length that start ``offset`` elements into them, NaN around."""
    rows, vocab = logits.shape
    around = torch.full((rows, vocab + 2 * offset + vocab % 2), torch.nan, dtype=logits.dtype, device=logits.device)
    view = around[:, offset : offset + vocab]
    return view.copy_(logits)


def exact(setting: Setting, divergence: str, dtype: torch.dtype) -> None:
    """Every vocabulary, in plain rows and in odd misaligned ones; one row is ignored."""
    options = {"divergence": divergence, "temperature": setting.temperature, "reduction": "none"}
    for vocab in setting.vocabularies:
        student, teacher, target = peaked_pair(setting.rows, vocab, dtype=dtype, device=setting.device, seed=vocab)
        target[-1] = IGNORED
        want = gate.expected(student, teacher, target, **options)
        layouts = {"plain": (student, teacher), "misaligned": (strided(student, 1), strided(teacher, 3))}
        for layout, (s, t) in layouts.items():
            loss, grad = run(s, t, target, **options)
            who = f"V={vocab} {layout}"
            gate.check_losses(who, loss, want)
            gate.check_gradient(who, grad, want)


def numbers_by_row(setting: Setting) -> None:
    """Per-row alpha, temperature and weight, smoothing and z-loss together."""
    rows, device = setting.rows, setting.device
    student, teacher, target = peaked_pair(rows, 257, dtype=torch.float32, device=device)
    ramp = torch.linspace(0.1, 1, rows, device=device)
    options = {"temperature": 1 + ramp, "alpha": ramp.flip(0), "row_weight": 2 * ramp, "label_smoothing": 0.1}
    options = {**options, "z_loss": 1e-3, "reduction": "none"}
    want = gate.expected(student, teacher, target, **options)
    loss, grad = run(student, teacher, target, **options)
    gate.check_losses("per-row numbers", loss, want)
    gate.check_gradient("per-row numbers", grad, want)


def masked(setting: Setting) -> None:
    """The same ids at -inf on both sides: nothing changes for the rest, and nothing is NaN."""
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "temperature": setting.temperature, "reduction": "none"}
        student, teacher, target = peaked_pair(3, 257, dtype=torch.float32, device=setting.device)
        student[:, 100:200], teacher[:, 100:200] = -torch.inf, -torch.inf
        target.fill_(5)
        want = gate.expected(student, teacher, target, **options)
        loss, grad = run(student, teacher, target, **options)
        gate.check_losses(divergence, loss, want)
        gate.check_gradient(divergence, grad, want)


def infinite(setting: Setting) -> None:
    """No mass of the student where the teacher has some: the loss is +inf, the gradient is not."""
    student, teacher, target = peaked_pair(3, 257, dtype=torch.float32, device=setting.device)
    student[1, 7] = -torch.inf
    target.fill_(5)
    loss, grad = run(student, teacher, target, reduction="none")
    need(loss[1] == torch.inf, f"the loss of the masked row must be inf, got {float(loss[1])}")
    need(loss[[0, 2]].isfinite().all(), "the other rows' losses must be finite")
    need(grad.isfinite().all(), "gradients must be finite")


def not_a_number(setting: Setting) -> None:
    """A row with a NaN, and one without a finite logit, are NaN and harm no other row; unless they are ignored."""
    student, teacher, target = peaked_pair(4, 257, dtype=torch.float32, device=setting.device)
    clean_loss, clean_grad = run(student, teacher, target, reduction="none")
    student[1, 9], student[2] = torch.nan, -torch.inf
    loss, grad = run(student, teacher, target, reduction="none")
    need(loss[[1, 2]].isnan().all(), f"the two bad rows must be NaN, got {loss[[1, 2]].tolist()}")
    need(torch.equal(loss[[0, 3]], clean_loss[[0, 3]]), "a bad row changed another row's loss")
    need(torch.equal(grad[[0, 3]], clean_grad[[0, 3]]), "a bad row changed another row's gradient")
    target[1:3] = IGNORED
    loss, grad = run(student, teacher, target)
    need(loss.isfinite(), f"a bad row that is ignored must not count, got {float(loss)}")
    need((grad[1:3] == 0).all(), "the gradient of an ignored row must be 0")


def nothing_counts(setting: Setting) -> None:
    """Every row ignored, and no row at all."""
    for rows in (3, 0):
        student, teacher, target = peaked_pair(rows, 257, dtype=torch.float32, device=setting.device)
        loss, grad = run(student, teacher, torch.full_like(target, IGNORED))
        need(loss == 0, f"{rows} rows, none counts: the loss must be 0, got {float(loss)}")
        need((grad == 0).all(), f"{rows} rows, none counts: the gradient must be 0")


def overwriting(setting: Setting) -> None:
    """The gradient lands in the logits' memory, with the same bits; without the option nothing is mutated."""
    student, teacher, target = peaked_pair(5, 257, dtype=torch.float32, device=setting.device)
    before = student.clone(), teacher.clone()
    _, want = run(student, teacher, target)
    need(torch.equal(student, before[0]) and torch.equal(teacher, before[1]), "an input was mutated")
    logits = as_output(student)
    (grad,) = torch.autograd.grad(kd(logits, teacher, target, overwrite_student=True), logits)
    need(grad.data_ptr() == student.data_ptr(), "the gradient is in other memory than the logits")
    need(torch.equal(grad, want), "the gradient differs from the one without overwriting")


def same_bits(setting: Setting) -> None:
    for divergence in MIXED:
        for rows in (2, 300) if setting.device == "cuda" else (2,):
            tensors = peaked_pair(rows, setting.vocabularies[-1], dtype=torch.float32, device=setting.device)
            first, second = (run(*tensors, divergence=divergence) for _ in range(2))
            for name, one, other in zip(("loss", "gradient"), first, second, strict=True):
                need(torch.equal(one, other), f"{divergence}, {rows} rows: the {name} differs from call to call")


def beyond_int32(setting: Setting) -> None:
    """More than 2**31 elements: rows on either side of that offset."""
    rows, vocab = 16400, 131072
    student, teacher, target = peaked_pair(rows, vocab, dtype=torch.bfloat16, device=setting.device)
    picked = torch.tensor([0, 8191, 16383, 16384, rows - 1], device=setting.device)
    want = gate.expected(student[picked], teacher[picked], target[picked], reduction="none")
    loss, grad = run(student, teacher, target, reduction="none")
    gate.check_losses(f"{rows}x{vocab}", loss[picked], want)
    gate.check_gradient(f"{rows}x{vocab}", grad[picked], want)


def cuda_graph(setting: Setting) -> None:
    """Capture forward and backward, replay on other data: the bits of an eager call."""
    for divergence in MIXED:
        captured, eager = _replayed(divergence, setting.device)
        for name, got, want in zip(("loss", "gradient"), captured, eager, strict=True):
            need(torch.equal(got, want), f"{divergence}: the {name} of the replay differs from an eager call")


def _replayed(divergence: str, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    tensors, others = (peaked_pair(64, 50257, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 1))
    student, teacher, target = tensors
    student.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = kd(student, teacher, target, divergence=divergence)
        return loss, *torch.autograd.grad(loss, student)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    return captured, step()


def no_synchronisation(setting: Setting) -> None:
    """Forward and backward never wait for the GPU, not with tensors as options either."""
    student, teacher, target = peaked_pair(64, 50257, dtype=torch.bfloat16, device=setting.device)
    by_row = torch.ones(64, device=setting.device)
    options = {"temperature": by_row, "alpha": by_row / 2, "row_weight": by_row, "normalizer": by_row.sum()}
    for divergence in DIVERGENCES:
        for more in ({}, options):
            run(student, teacher, target, divergence=divergence, **more)
            with waiting_is_an_error():
                run(student, teacher, target, divergence=divergence, **more)


def heads(setting: Setting, dtype: torch.dtype) -> None:
    """Logits not computed yet."""
    gpu_head_checks.numbers(setting.device, dtype, kd)
    gpu_head_checks.everything(setting.device, dtype, kd)
    gpu_compaction_checks.numbers(setting.device, dtype, kd)


def matmuls_of_heads(setting: Setting) -> None:
    gpu_head_checks.matmuls(setting.device)


def steps_do_not_wait(setting: Setting) -> None:
    steps = [checks.step_on(setting.device, kd) for checks in (gpu_head_checks, gpu_compaction_checks)]
    for step in (*steps, gpu_attention_checks.step_on(setting.device, attention)):
        step()
        with waiting_is_an_error():
            step()


def compiles_whole(setting: Setting) -> None:
    """``torch.compile(fullgraph=True)``, forward and backward, over a model's last layer."""
    weight = torch.eye(257, device=setting.device)
    student, teacher, target = peaked_pair(7, 257, dtype=torch.float32, device=setting.device)
    want = gate.expected(student, teacher, target, reduction="none")
    compiled = torch.compile(lambda s, t, y: kd(s @ weight, t, y, reduction="none"), fullgraph=True)
    student.requires_grad_()
    loss = compiled(student, teacher, target)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    gate.check_losses("compiled", loss.detach(), want)
    gate.check_gradient("compiled", grad, want)


def no_recompilation(setting: Setting) -> None:
    """Another batch size or another odd vocabulary takes the kernels that are there."""
    for divergence in MIXED:
        run(*peaked_pair(601, 5003, dtype=torch.bfloat16, device=setting.device), divergence=divergence)
        with _compilations() as compiled:
            for rows, vocab in ((640, 5003), (777, 5003), (601, 5009), (608, 5011)):
                run(*peaked_pair(rows, vocab, dtype=torch.bfloat16, device=setting.device), divergence=divergence)
        need(not compiled, f"{divergence}: compiled again: {', '.join(compiled)}")


@contextmanager
def _compilations() -> Iterator[list[str]]:
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **event: names.append(event["fn"].name)
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


ANYWHERE = (numbers_by_row, masked, infinite, not_a_number, nothing_counts, overwriting, same_bits)
ON_GPU = (
    *(no_synchronisation, cuda_graph, no_recompilation, compiles_whole, beyond_int32),
    *(matmuls_of_heads, steps_do_not_wait),
)


def checks(setting: Setting) -> dict[str, Callable[[], None]]:
    """Name -> a function that raises if the check fails."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in setting.dtypes:
        for divergence in DIVERGENCES:
            name = f"exact {divergence} {str(dtype).removeprefix('torch.')}"
            found[name] = partial(exact, setting, divergence, dtype)
        found[f"heads {str(dtype).removeprefix('torch.')}"] = partial(heads, setting, dtype)
        name = f"teachers without logits {str(dtype).removeprefix('torch.')}"
        found[name] = partial(gpu_teacher_checks.numbers, setting.device, dtype, kd)
        name = f"attention {str(dtype).removeprefix('torch.')}"
        found[name] = partial(gpu_attention_checks.numbers, setting.device, dtype, attention)
    for check in (*ANYWHERE, *(ON_GPU if setting.device == "cuda" else ())):
        found[check.__name__.replace("_", " ")] = partial(check, setting)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_checks.py", description=__doc__.split("\n")[0])
    parser.add_argument("--interpret", action="store_true", help="the small checks, in Triton's interpreter on the CPU")
    parser.add_argument("--only", nargs="+", default=("",), help="checks with one of these in their name")
    parser.add_argument("--skip", nargs="+", default=(), help="checks with one of these in their name")
    args = parser.parse_args(argv)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported, which no import above does
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # numpy's, of infinities
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was checked (--interpret runs the small checks on the CPU)")
        return CANNOT_RUN
    setting = INTERPRETER if args.interpret else GPU
    try:
        run(*peaked_pair(2, 8, dtype=torch.float32, device=setting.device))
    except RuntimeError as error:  # a pin that is refused says why
        print(f"the Triton kernels cannot run here: {error}")
        return CANNOT_RUN
    except Exception as error:
        if not (args.interpret and NUMPY_REFUSES in str(error)):
            raise
        versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "numpy"))
        print(f"the Triton kernels cannot run here: the interpreter does not work with {versions} together ({error})")
        return CANNOT_RUN
    chosen = {name: check for name, check in checks(setting).items() if _named(name, args.only)}
    chosen = {name: check for name, check in chosen.items() if not _named(name, args.skip)}
    return run_all(chosen)


def _named(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


if __name__ == "__main__":
    raise SystemExit(main())
