"""Time a family of fastkd against what people write today, and add the rows to bench/results.

    python bench/run.py kd --vocab 50257 --divergence forward_kl jsd
    python bench/run.py call

A family is a file of this folder with ``add_arguments(parser)`` and ``cases(args, device)``, which checks every number
before it hands a case out: on a wrong one nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
# Last, so that an installed fastkd is the one that is timed; without one, this checkout is.
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

NEEDS = ("psutil", "rich", "tqdm")
if absent := ", ".join(name for name in NEEDS if importlib.util.find_spec(name) is None):
    raise SystemExit(f"bench/run.py needs {absent}: pip install 'fastkd[bench]' brings it")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench import measure, memory, record, screen  # noqa: E402
from bench.bandwidth import Copy  # noqa: E402
from bench.exponentials import Exponentials  # noqa: E402
from bench.gate import Wrong  # noqa: E402
from bench.matmul import Matmul  # noqa: E402
from bench.measure import Case, Contender  # noqa: E402

ROUNDS = {"cpu": 15, "cuda": 30}


class Family(Protocol):
    PROVIDERS: Sequence[str]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def cases(self, args: argparse.Namespace, device: torch.device) -> Iterable[Case]: ...


def families() -> dict[str, str]:
    """Name -> the first line of its docstring."""
    files = (path for path in sorted(Path(__file__).parent.glob("*.py")) if "\ndef cases(" in path.read_text())
    return {path.stem: path.read_text().split('"""')[1].split("\n")[0] for path in files}


def main(argv: Sequence[str] | None = None) -> int:
    family, args = _arguments(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    shared = record.environment(device, args.command, args.commit)
    path = record.file_for(args.out, args.family, shared)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(", ".join(f"{name} {value}" for name, value in shared.items() if value != ""))
    # Who was asked for by name, and fastkd always, must run; another rival may be absent.
    required = set(args.providers) if args.explicit else {name for name in args.providers if name.startswith("fastkd")}
    missing: set[str] = set()
    try:
        for case in family.cases(args, device):
            rows = measure_case(case, shared, device, args.repeat or ROUNDS[device.type])
            screen.show(console, case, rows)
            if rows:
                record.append(path, rows)
            missing |= case.absent.keys() & required
    except Wrong as wrong:
        console.print(f"refused to time, a number is wrong: {wrong}", style="bold red")
        return 1
    console.print(f"rows are in {path}" if path.exists() else "no rows were written")
    if missing:
        console.print(f"could not run, see above: {', '.join(sorted(missing))}", style="bold red")
    return 1 if missing else 0


def measure_case(case: Case, shared: record.Row, device: torch.device, rounds: int) -> list[record.Row]:
    if not case.contenders:
        return []
    contenders = list(case.contenders)
    roofs: dict[str, Copy | Exponentials | Matmul] = {}
    if case.least_bytes:
        roofs["copy"] = Copy(device)
    if case.least_exponentials:
        roofs["exp2"] = Exponentials(device)
    if case.matmul:
        roofs["matmul"] = case.matmul
    contenders += [Contender(name, roof) for name, roof in roofs.items()]
    title = " ".join(str(value) for value in case.labels.values())
    with tqdm(total=rounds * len(contenders), desc=title, leave=False, disable=None) as bar:
        samples = measure.interleave(contenders, measure.clock_for(device, case.calls), rounds, bar.update)
    peaks = {one.name: memory.peak(one, device, case.inputs) for one in case.contenders if case.inputs}
    rates = {
        name: roof.work / measure.figures([s.wall for s in samples.pop(name)]).median for name, roof in roofs.items()
    }
    return record.rows_of(case, shared, samples, peaks, **rates)


def _arguments(argv: Sequence[str] | None) -> tuple[Family, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="family", required=True, metavar="family")
    modules: dict[str, Any] = {}
    for name, summary in families().items():
        modules[name] = importlib.import_module(f"bench.{name}")
        sub = subparsers.add_parser(name, help=summary)
        sub.add_argument(
            "--device",
            default="cuda" if torch.cuda.is_available() else "cpu",
            choices=("cpu", "cuda"),
            help="default: cuda where there is one",
        )
        sub.add_argument("--repeat", type=int, help=f"rounds; default: {ROUNDS['cpu']}, on cuda {ROUNDS['cuda']}")
        sub.add_argument("--threads", type=int, help="of the CPU; default: what torch takes")
        sub.add_argument(
            "--out", type=Path, default=record.RESULTS, help="folder of the CSV files; default: bench/results"
        )
        sub.add_argument("--commit", help="name of the code's commit, where git cannot tell")
        sub.add_argument("--providers", nargs="+", choices=modules[name].PROVIDERS, help="default: all")
        modules[name].add_arguments(sub)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    args.command = _command(sys.argv[1:] if argv is None else argv)
    args.explicit, args.providers = bool(args.providers), args.providers or modules[args.family].PROVIDERS
    return modules[args.family], args


def _command(argv: Sequence[str]) -> str:
    """What others can type to get the same rows: where they went, and what the code was called, is not part of it."""
    words = iter(argv)
    kept = ["python", "bench/run.py"]
    for word in words:
        if word in ("--out", "--commit"):
            next(words, None)
        elif not word.startswith(("--out=", "--commit=")):
            kept.append(word)
    return shlex.join(kept)


if __name__ == "__main__":
    raise SystemExit(main())
