"""The ``fastkd`` command."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fastkd

from . import native

DEMO_NEEDS = ("matplotlib", "rich", "sklearn", "tokenizers")  # modules, of the extra "demo"
BENCH_NEEDS = ("psutil", "rich", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # whatever follows, --help too, is for the bench
        return bench(given[1:])
    options = _parser().parse_args(given)
    if options.command == "demo":
        return demo(options)
    if options.command == "explain":
        return explain(options.operation)
    for name, value in versions().items():
        print(f"{name:<17} {value}")
    print()
    fastkd.explain()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastkd",
        description="Fast knowledge distillation losses. Without a command: versions, and what runs here.",
    )
    parser.add_argument("--version", action="version", version=f"fastkd {fastkd.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    summary = "distil on real data: one to two minutes on two cores, no download"
    demo_parser = commands.add_parser("demo", help=summary, description=summary)
    demo_parser.add_argument(
        "--out", type=Path, default=Path("fastkd-demo"), help="folder for the results (%(default)s)"
    )
    demo_parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="of the digits' students; the text takes the first (0 1 2 3 4)",
    )
    demo_parser.add_argument("--only", choices=("digits", "text"), help="one part instead of both")
    demo_parser.add_argument(
        "--all",
        action="store_true",
        help="more students: of the teacher's features and relations, one for whom no logits are stored, one of an "
        "int8 teacher; every way of distilling; and networks with int8 layers",
    )

    summary = "run a bench of the source tree"
    commands.add_parser("bench", help=summary, usage="fastkd bench <name> ...")

    summary = "which implementation computes an operation here, and why not another"
    explain_parser = commands.add_parser("explain", help=summary, description=summary)
    explain_parser.add_argument("operation", nargs="?", help="such as kd_loss; all of them if left out")
    return parser


def versions() -> dict[str, str]:
    """What a report of a problem has to say."""
    missing = native.missing()
    return {
        "fastkd": fastkd.__version__,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu kernels": native.extension().instruction_set() if missing is None else "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def demo(options: argparse.Namespace) -> int:
    if status := _missing("demo", DEMO_NEEDS):
        return status
    if (wrong := native.wrong_setting()) is not None:
        return _fail(f"fastkd demo: {wrong}")
    from . import demo as package  # heavy, and what it imports is optional

    settings = package.Settings()
    if options.seeds:
        settings = replace(settings, seeds=tuple(options.seeds))
    if options.all:
        settings = replace(
            settings,
            digits=replace(settings.digits, terms=True, methods=True),
            text=replace(settings.text, heads=True, int8=True),
            int8=True,
        )
    return package.run(options.out, package.PARTS if options.only is None else (options.only,), settings)


def explain(operation: str | None) -> int:
    try:
        fastkd.explain(operation)
    except ValueError as error:
        return _fail(str(error))
    return 0


def bench(arguments: Sequence[str]) -> int:
    script = find_bench()
    if script is None:
        return _fail(
            "fastkd bench: there is no bench/run.py here; the benches live in the source tree, not in the installed "
            "package, so run this inside a checkout of fastkd"
        )
    return _missing("bench", BENCH_NEEDS) or subprocess.run([sys.executable, str(script), *arguments]).returncode


def find_bench() -> Path | None:
    """In the current folder, or beside the package when that is imported from a checkout."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[1]):
        script = root / "bench" / "run.py"
        if script.is_file():
            return script
    return None


def _missing(extra: str, modules: Sequence[str]) -> int:
    missing = ", ".join(module for module in modules if importlib.util.find_spec(module) is None)
    return _fail(f"fastkd {extra} needs {missing}: pip install 'fastkd[{extra}]' brings it") if missing else 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
