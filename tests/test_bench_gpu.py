"""What a GPU machine runs, ``bench/gpu.sh`` and ``bench/gpu_checks.py``: neither passes over a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from bench import gpu_checks, gpu_head_checks, gpu_report, gpu_teacher_checks, measure
from bench.gate import Wrong
from bench.measure import Contender

ROOT = Path(__file__).resolve().parents[1]
GPU_CHECKS = gpu_checks.checks(gpu_checks.GPU)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GPU_CHECKS)
def test_on_gpu(name: str) -> None:
    GPU_CHECKS[name]()


def test_the_host_gets_a_head_start_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        names = iter(("start", "end"))

        def __init__(self, enable_timing: bool) -> None:
            self.name = next(Event.names)

        def record(self) -> None:
            done.append(self.name)

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles / 2e6:g} ms"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: done.append("wait"))
    monkeypatch.setattr(measure, "ramp_clocks", lambda device: None)
    clock = measure.EventClock(torch.device("cpu"))
    filled = clock.evict.sum()
    contender = Contender("x", lambda: done.append("run") or (), lambda: done.append("prepare"))
    assert clock.time(contender) == (0.003, None)
    assert done == ["prepare", "sleep 1 ms", "start", "run", "end", "wait"]
    assert clock.evict.sum() > filled


@interpreted
def test_gpu_checks_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main([]) == gpu_checks.CANNOT_RUN
    assert "no CUDA device" in capsys.readouterr().out


RIGHT = gpu_checks.kd


def loss_off_by_a_hair(*arguments: Any, **options: Any) -> Tensor:
    return RIGHT(*arguments, **options) * 1.001


def gradient_off_by_a_hair(*arguments: Any, **options: Any) -> Tensor:
    loss = RIGHT(*arguments, **options)
    return torch.where(loss.isfinite(), loss + 0.001 * (loss - loss.detach()), loss)


def large_instead_of_infinite(*arguments: Any, **options: Any) -> Tensor:
    return RIGHT(*arguments, **options).clamp(max=1e30)


def never_nan(*arguments: Any, **options: Any) -> Tensor:
    return RIGHT(*arguments, **options).nan_to_num(nan=1.0, posinf=torch.inf)


def another_number_every_time(*arguments: Any, **options: Any) -> Tensor:
    return RIGHT(*arguments, **options) * (1 + 1e-3 * torch.rand(()))


def never_zero(*arguments: Any, **options: Any) -> Tensor:
    return RIGHT(*arguments, **options) + 1


def never_overwriting(*arguments: Any, **options: Any) -> Tensor:
    return RIGHT(*arguments, **{**options, "overwrite_student": False})


@interpreted
@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("exact forward_kl float32", loss_off_by_a_hair, "V=2 plain: loss is"),
        ("exact forward_kl float32", gradient_off_by_a_hair, "V=2 plain: gradient is"),
        ("numbers by row", gradient_off_by_a_hair, "per-row numbers: gradient is"),
        ("infinite", large_instead_of_infinite, "the loss of the masked row must be inf, got 1"),
        ("not a number", never_nan, "the two bad rows must be NaN"),
        ("nothing counts", never_zero, "3 rows, none counts: the loss must be 0, got 1"),
        ("overwriting", never_overwriting, "the gradient is in other memory than the logits"),
        ("same bits", another_number_every_time, "forward_kl, 2 rows: the loss differs from call to call"),
    ],
)
def test_a_wrong_kernel_fails(
    check: str,
    wrong: Callable[..., Tensor],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_checks, "kd", wrong)
    assert gpu_checks.main(["--interpret", "--only", check]) == 1
    reported = capsys.readouterr().out
    assert f"FAILED  {check}: Wrong: {said}" in reported
    assert reported.endswith(f"1 failed: {check}\n")


@pytest.mark.parametrize("check", [gpu_head_checks.numbers, gpu_head_checks.everything, gpu_teacher_checks.numbers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_beside_those_of_logits(check: Callable[..., None], dtype: torch.dtype) -> None:
    """With whatever computes it here."""

    def gradient_off(*arguments: Any, **options: Any) -> Tensor:
        loss = fastkd.kd_loss(*arguments, **options)
        return loss + 0.05 * (loss - loss.detach())

    def loss_off(*arguments: Any, **options: Any) -> Tensor:
        return 1.05 * fastkd.kd_loss(*arguments, **options).detach() + fastkd.kd_loss(*arguments, **options) * 0

    check("cpu", dtype, fastkd.kd_loss)
    with pytest.raises(Wrong, match=r"gradient is|of the input is off by"):
        check("cpu", dtype, gradient_off)
    with pytest.raises(Wrong, match=r"loss is"):
        check("cpu", dtype, loss_off)


@interpreted
def test_every_matmul_that_torch_refuses_is_named() -> None:
    with pytest.raises(Wrong) as wrong:
        gpu_head_checks.matmuls("cpu")
    failures = str(wrong.value).split("; ")
    assert len([failure for failure in failures if failure.startswith(("bfloat16 ", "float16 "))]) == 8
    assert "bfloat16 logits, torch.mm(input, weight.t(), out_dtype=float32, out=): " in failures[0]


def test_a_crash_is_placed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "addmm", refuse)
    head = fastkd.Head(torch.ones(2, 3), torch.ones(5, 3))
    assert not gpu_report.report("heads", lambda: fastkd.kd_loss(head, head))
    said = capsys.readouterr().out
    assert said.startswith("FAILED  heads: RuntimeError: not here (at fastkd/losses/_sources.py:")
    assert "torch.addmm(" in said


@pytest.fixture
def toy_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three instant checks, the second of which crashes."""

    def crash() -> None:
        raise ZeroDivisionError("by zero")

    named = {"exact a float32": lambda: None, "exact b float16": crash, "others": lambda: None}
    monkeypatch.setattr(gpu_checks, "checks", lambda setting: named)
    monkeypatch.setattr(gpu_checks, "run", lambda *tensors: None)


@interpreted
@pytest.mark.parametrize(
    ("words", "status", "ran"),
    [
        ([], 1, ["ok exact a float32", "FAILED exact b float16", "ok others"]),
        (["--only", "float16", "others"], 1, ["FAILED exact b float16", "ok others"]),
        (["--skip", "float16"], 0, ["ok exact a float32", "ok others"]),
        (["--only", "exact", "--skip", "float16", "other"], 0, ["ok exact a float32"]),
    ],
)
@pytest.mark.usefixtures("toy_checks")
def test_a_crash_is_a_failure_and_stops_nothing(
    words: list[str], status: int, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_checks.main(["--interpret", *words]) == status
    *lines, last = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split(": ")[0].split(" (")[0].split()) for line in lines] == ran
    assert last == ("1 failed: exact b float16" if status else "all ok")


@interpreted
def test_an_interpreter_that_numpy_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_with(message: str) -> None:
        def run(*tensors: Tensor) -> None:
            raise TypeError(message)

        monkeypatch.setattr(gpu_checks, "run", run)

    pytest.importorskip("triton")
    fail_with("InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')")
    assert gpu_checks.main(["--interpret"]) == gpu_checks.CANNOT_RUN
    said = capsys.readouterr().out
    assert said.startswith("the Triton kernels cannot run here: the interpreter does not work with triton ")
    assert said.count("\n") == 1
    fail_with("something else")
    with pytest.raises(TypeError, match="something else"):
        gpu_checks.main(["--interpret"])


@dataclass
class Machine:
    """A folder of stand-ins for the commands that ``bench/gpu.sh`` calls, and what was called."""

    bin: Path
    log: Path

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def gpu_script(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit status, and the summary (or everything, if it did not get that far)."""
        # A variable that some steps must not see, and a path in front of which the checkout belongs.
        surroundings = {"TRITON_INTERPRET": "1", "PYTHONPATH": "/elsewhere", "PYTHON": str(self.bin / "python")}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "bench/gpu.sh", *words],
            cwd=ROOT,
            env={**os.environ, "PATH": path, "OUT": str(self.bin), "LOG": str(self.log), **surroundings, **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )
        return done.returncode, done.stdout.split("== summary\n")[-1] + done.stderr

    @property
    def called(self) -> list[str]:
        return self.log.read_text().splitlines()


# Writes the report that pytest writes.
REPORT = """for word; do
    [[ $word != --junitxml=* ]] ||
        printf '<testsuite errors="0" skipped="%s" tests="36">' "${SKIPPED:-0}" >"${word#*=}"
done"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Where everything works."""
    machine = Machine(tmp_path / "bin", tmp_path / "log")
    machine.bin.mkdir()
    machine.command("python", REPORT)
    machine.command("nvidia-smi", "exit 0")
    # The real one, after a note of the limit, of what the command sees, and of the command.
    seen = 'echo "$2 ${TRITON_INTERPRET-unset} $PYTHONPATH ${*:3}" | head -n 1 >>"$LOG"'
    machine.command("timeout", f'{seen}\nexec "{shutil.which("timeout")}" "$@"')
    return machine


STEPS = [
    "environment",
    "gpu",
    "build",
    "tests",
    "kd",
    "head",
    "kd-divergences",
    "attention",
    "relation",
    "int8",
    "topk",
    "call",
    "losses",
]


def test_a_gpu_machine_where_everything_works(machine: Machine) -> None:
    status, summary = machine.gpu_script()
    assert [line.split()[:2] for line in summary.splitlines()] == [["ok", step] for step in STEPS]
    assert status == 0
    limits, interpreters, paths, commands = zip(*(line.split(" ", 3) for line in machine.called), strict=True)
    assert sum(map(int, limits)) < 540
    assert set(interpreters) == {"unset"}
    assert set(paths) == {f"{ROOT}:{ROOT / 'kernels'}:/elsewhere"}
    tests = [command for command in commands if " -m pytest " in command]
    files = [word.split("::") for command in tests for word in command.split() if word.startswith("tests/")]
    assert [file for file, *_ in files] == [
        "tests/test_bench_gpu.py",
        "tests/test_bench_gpu_relation.py",
        "tests/test_bench_gpu_int8.py",
        "tests/test_triton_kernels.py",
        "tests/test_matmul.py",
        "tests/test_head_device_compaction.py",
        "tests/test_logit.py",
    ]
    assert all((ROOT / file).exists() for file, *_ in files)
    assert files[0][1] == test_on_gpu.__name__


@pytest.mark.parametrize("skipped", ["1", "36"])
def test_a_test_that_is_skipped_on_a_gpu_machine_has_failed(machine: Machine, skipped: str) -> None:
    status, summary = machine.gpu_script(SKIPPED=skipped)
    for step in ("tests", "losses"):
        assert f"FAILED   {step}: {skipped} of 36 tests were skipped\n" in summary
    assert len(summary.splitlines()) == len(STEPS)
    assert status == 1


def test_a_gpu_machine_without_pytest(machine: Machine) -> None:
    machine.command("python", '[[ "$* " != *"find_spec"*" pytest "* ]]')
    status, summary = machine.gpu_script()
    assert "ok       checks (" in summary
    assert status == 0
    assert not [line for line in machine.called if "-m pytest" in line]
    assert sum(int(line.split()[0]) for line in machine.called) < 540


@pytest.mark.parametrize(("version", "builds"), [("76.1.0", False), ("77.0.1", True), ("100.0", True)])
def test_setuptools_that_cannot_read_our_metadata_are_passed_over(machine: Machine, version: str, builds: bool) -> None:
    (machine.bin / "setuptools.py").write_text(f"__version__ = {version!r}\n")
    machine.command("python", f'{REPORT}\n[[ $* != *__version__* ]] || exec "{sys.executable}" "$@"')
    status, summary = machine.gpu_script(PYTHONPATH=str(machine.bin))
    assert ("ok       build (" in summary) == builds
    assert ("skipped  build: setuptools older than 77 cannot read pyproject.toml" in summary) != builds
    assert any("setup.py" in line for line in machine.called) == builds
    assert status == 0


@pytest.mark.parametrize("step", STEPS)
def test_one_step_that_fails_fails_the_run_and_stops_nothing(machine: Machine, step: str) -> None:
    # By what only this step's command has in it.
    sign = {"environment": "explain", "gpu": "--query-gpu", "build": "--inplace", "tests": "/tests.xml"}
    sign |= {
        "head": "run.py head",
        "kd": "32000",
        "kd-divergences": "jsd",
        "topk": "run.py topk",
        "attention": "run.py attention",
        "relation": "run.py relation",
        "int8": "run.py int8",
        "call": "run.py call",
        "losses": "/losses.xml",
    }
    script = f'{REPORT}\n[[ $* == *"{sign[step]}"* ]] && exit 3\nexit 0'
    machine.command("python", script)
    machine.command("nvidia-smi", script)
    status, summary = machine.gpu_script()
    assert f"FAILED   {step}: exit status 3\n" in summary
    assert [line.split()[1].rstrip(":") for line in summary.splitlines()] == STEPS
    assert summary.count("FAILED") == 1
    assert status == 1


def test_a_dry_run_fails_where_python_does(machine: Machine) -> None:
    status, summary = machine.gpu_script("--dry-run", PYTHON="false")
    assert summary.count("FAILED") == 9
    assert "FAILED   checks: exit status 1\n" in summary
    assert status == 1


def test_what_cannot_run_is_skipped_in_a_dry_run_alone(machine: Machine) -> None:
    machine.command("python", "[[ $* != *gpu_checks* ]] || exit 2")
    status, summary = machine.gpu_script("--dry-run")
    assert "skipped  checks: cannot run here, see above\n" in summary
    assert status == 0
    machine.command("python", '[[ "$* " != *"find_spec"*" pytest "* ]] || exit 1\n[[ $* != *gpu_checks* ]] || exit 2')
    status, summary = machine.gpu_script()
    assert "FAILED   checks: exit status 2\n" in summary
    assert status == 1


def test_a_step_over_its_limit_is_ended_and_said(machine: Machine) -> None:
    machine.command("python", "[[ $* != *gpu_checks* ]] || exec sleep 60")
    status, summary = machine.gpu_script("--dry-run", LIMIT="1")
    assert "FAILED   checks: exit status 124, over 1 s\n" in summary
    assert "ok       call (" in summary
    assert status == 1


@pytest.mark.slow
def test_gpu_script_dry_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "COMMIT": "abc1234"}
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.split("== summary\n")[1]
    assert "FAILED" not in summary
    for step in ("environment", "build", "checks", "kd", "head", "topk", "attention", "relation", "int8", "call"):
        assert f" {step}" in summary
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == [
        "attention",
        "call",
        "head",
        "int8",
        "kd",
        "relation",
        "topk",
    ]
