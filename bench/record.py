"""Rows of results: where and of what they were measured, their figures, and the CSV file they are added to."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastkd
from bench.measure import Case, Contender, Figures, Sample, figures
from bench.memory import Peak
from fastkd import native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
GENERATED = (":!bench/results", ":!README.md")  # a bench that writes its rows does not make the code it timed dirty
BASELINES = ("eager", "compiled")
WIDE = 1.3  # the 80th percentile over the 20th: above that, something else ran on the machine
Row = dict[str, object]


def environment(device: torch.device, command: str, commit: str | None = None) -> Row:
    """The columns that every row of one run shares."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "isa": _isa(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "command": command,
    }


def rows_of(
    case: Case,
    shared: Row,
    samples: Mapping[str, Sequence[Sample]],
    peaks: Mapping[str, Peak | None],
    copy: float | None = None,
    exp2: float | None = None,
    matmul: float | None = None,
) -> list[Row]:
    """One row a contender.

    ``copy``: bytes per second that a copy moved in the same rounds; ``exp2``: exponentials; ``matmul``: floating-point
    operations.
    """
    wall = {name: figures([sample.wall for sample in taken]) for name, taken in samples.items()}
    cpu_samples = {name: [sample.cpu for sample in taken if sample.cpu] for name, taken in samples.items()}
    cpu = {name: figures(seconds) for name, seconds in cpu_samples.items() if seconds}

    def times(name: str, baseline: str, clock: Mapping[str, Figures]) -> float | None:
        return clock[baseline].median / clock[name].median if {baseline, name} <= clock.keys() else None

    def row(contender: Contender) -> Row:
        name, peak = contender.name, peaks.get(contender.name)
        rate = case.least_bytes / wall[name].median if case.least_bytes else None
        exponentials = case.least_exponentials / wall[name].median if case.least_exponentials else None
        operations = case.matmul.work / wall[name].median if case.matmul else None
        figures_of = {
            "provider": name,
            "impl": contender.impl,
            "rounds": len(samples[name]),
            **_milliseconds("wall", wall[name]),
            **_milliseconds("cpu", cpu.get(name)),
            "least_mb": _scaled(case.least_bytes, 1e-6),
            "gb_per_s": _scaled(rate, 1e-9),
            "copy_gb_per_s": _scaled(copy, 1e-9),
            "percent_of_copy": _scaled(rate / copy if rate and copy else None, 100),
            "least_mexp": _scaled(case.least_exponentials, 1e-6),
            "gexp_per_s": _scaled(exponentials, 1e-9),
            "exp2_gexp_per_s": _scaled(exp2, 1e-9),
            "percent_of_exp2": _scaled(exponentials / exp2 if exponentials and exp2 else None, 100),
            "least_gflop": _scaled(case.matmul.work if case.matmul else None, 1e-9),
            "gflop_per_s": _scaled(operations, 1e-9),
            "matmul_gflop_per_s": _scaled(matmul, 1e-9),
            "percent_of_matmul": _scaled(operations / matmul if operations and matmul else None, 100),
            **{f"times_{baseline}": _scaled(times(name, baseline, wall)) for baseline in BASELINES},
            **{f"cpu_times_{baseline}": _scaled(times(name, baseline, cpu)) for baseline in BASELINES},
            "peak_mib": _scaled(peak.beside_inputs if peak else None, 2**-20),
            "extra_mib": _scaled(peak.beside_results if peak else None, 2**-20),
        }
        if contender.error is not None:
            figures_of["error"] = _scaled(contender.error)
        return {**shared, **case.labels, **figures_of}

    return [row(contender) for contender in case.contenders]


def append(path: Path, rows: Sequence[Row]) -> None:
    """Rows of before have nothing in columns that are new. Rows that lack a column belong into a new file."""
    header = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _header(path)
    if found and not set(found) <= set(header):
        raise ValueError(f"{path} has other columns ({', '.join(set(found) ^ set(header))}): move it away")
    if found == header:
        _write(path, "a", header, rows)
    else:
        wider = path.with_suffix(".new")  # whole before it takes the place of the old one
        _write(wider, "w", header, [*(read(path) if found else []), *rows])
        wider.replace(path)


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _write(path: Path, mode: str, header: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_wide(row: Mapping[str, object]) -> bool:
    """Whether the runs of a row spread so widely that its median says little."""
    p20, p80 = (row.get(f"wall_{name}_ms") for name in ("p20", "p80"))
    return bool(p20 and p80) and float(str(p80)) > WIDE * float(str(p20))


def file_for(folder: Path, family: str, shared: Row) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", str(shared["machine"]).lower()).strip("-")
    return folder / f"{family}-{slug}.csv"


def machine(device: torch.device) -> str:
    """Name of the processor that computes."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _milliseconds(clock: str, seconds: Figures | None) -> Row:
    columns = (("median", f"{clock}_ms"), ("p20", f"{clock}_p20_ms"), ("p80", f"{clock}_p80_ms"))
    return {column: _scaled(getattr(seconds, field, None), 1e3) for field, column in columns}


def _scaled(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.5g}"


def _commit() -> str:
    """Of the checkout that fastkd was imported from; "unknown" where that is no checkout, or there is no git."""
    if not Path(fastkd.__file__).resolve().is_relative_to(ROOT / "fastkd"):
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *GENERATED)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _isa(device: torch.device) -> str:
    """The instruction set that fastkd's kernels use."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return "" if native.missing() else str(native.extension().instruction_set())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
