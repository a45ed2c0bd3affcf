"""What is shipped: the pins, the extension that was built, and the flags it was built with."""

from __future__ import annotations

import ast
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastkd
from fastkd import cli, native

ROOT = Path(__file__).resolve().parents[1]
TORCH_PIN = "==2.13.0"
OLDEST_TORCH = "2.11"
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where it is not the module's name
# Bound to one build of torch: pip would replace torch to satisfy them.
NEVER = {"torchvision", "torchaudio", "timm"}
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2", "generic") if X86 else ("generic",)

installed = pytest.mark.skipif(
    next(importlib.metadata.Distribution.discover(name="fastkd"), None) is None,
    reason="fastkd is not installed, it runs from a checkout",
)


@pytest.fixture
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_repeats_the_pin_of_torch(project: dict) -> None:
    """A range in an extra would let pip replace an installed CPU build of torch by a CUDA build."""
    assert project["optional-dependencies"]
    for extra, lines in project["optional-dependencies"].items():
        assert f"torch{TORCH_PIN}" in lines, f"the extra {extra} must pin torch{TORCH_PIN}"


def test_the_pin_is_read_before_the_range(project: dict) -> None:
    """pip fetches the newest torch, CUDA and all, as soon as it reads a range, even if a pin overrules it later."""
    first, *others = (Requirement(line) for line in project["dependencies"])
    assert (first.name, str(first.specifier)) == ("torch", TORCH_PIN)
    assert all(first.marker.evaluate({"extra": extra}) for extra in project["optional-dependencies"])
    assert not first.marker.evaluate({"extra": ""}), "fastkd alone must not pin torch"
    assert "torch" in {other.name for other in others}


def test_the_library_takes_any_newer_torch(project: dict) -> None:
    requirements = [Requirement(line) for line in project["dependencies"]]
    (torch_,) = (one for one in requirements if one.name == "torch" and one.marker is None)
    assert str(torch_.specifier) == f">={OLDEST_TORCH}"
    assert torch_.specifier.contains(TORCH_PIN.removeprefix("==")), "pip cannot meet both"


def imported(*files: Path) -> set[str]:
    """The packages that these files import, wherever in them."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def required(lines: list[str]) -> set[str]:
    return {Requirement(line).name for line in lines}


def test_the_extras_are_what_is_imported(project: dict) -> None:
    extras, here = project["optional-dependencies"], {"bench", "fastkd", "torch"}
    demo = imported(*(ROOT / "fastkd" / "demo").glob("*.py")) - here
    assert demo == set(cli.DEMO_NEEDS)
    assert required(extras["demo"]) - {"torch"} == {DISTRIBUTIONS.get(name, name) for name in demo}

    distill = imported(*(ROOT / "fastkd" / "distill").glob("*.py")) - here
    assert required(extras["distill"]) - {"torch"} == distill - {"numpy"} | {"tensorboard"}  # through torch.utils

    bench = imported(*(ROOT / "bench").glob("*.py")) - here
    rivals_and_devices = {"bitsandbytes", "liger_kernel", "optimum", "pykeops", "torchao", "torchdistill", "triton"}
    drawing = {"matplotlib"}
    compiling = {"setuptools"}  # torch.compile imports it on the CPU
    assert bench - rivals_and_devices - drawing == set(cli.BENCH_NEEDS)
    assert required(extras["bench"]) - {"torch"} == bench - rivals_and_devices | compiling


def closure(distribution: str, extras: set[str]) -> Iterator[Requirement]:
    """Every requirement that pip would follow from here, as the installed metadata has it; torch's own are torch's."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(f"{distribution}[{','.join(sorted(extras))}]")]
    while todo:
        requirement = todo.pop()
        yield requirement
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or key[0] == "torch":
            continue
        seen.add(key)
        for line in importlib.metadata.requires(key[0]) or []:
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *key[1])):
                todo.append(one)


@installed
def test_all_extras_together_leave_torch_alone() -> None:
    """In this environment, which holds them all: each requirement is met, by this torch, and none is CUDA's."""
    extras = set(importlib.metadata.metadata("fastkd").get_all("Provides-Extra"))
    requirements = list(closure("fastkd", extras))
    assert len(requirements) > 20
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name not in NEVER
        assert not name.startswith("nvidia-"), f"{requirement} is not torch's own"
        version = importlib.metadata.version(name)  # raises for one that is missing
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, but {version} is installed"
    if torch.version.cuda is None:
        names = {canonicalize_name(found.metadata["Name"]) for found in importlib.metadata.distributions()}
        assert not {name for name in names if name.startswith("nvidia-")}


@installed
def test_the_version_is_said_once() -> None:
    assert fastkd.__version__ == importlib.metadata.version("fastkd")


def public_names(stub: str) -> set[str]:
    names = set()
    for node in ast.parse(stub).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_the_stub_names_what_the_extension_has() -> None:
    extension = native.extension()
    stub = public_names((ROOT / "fastkd" / "_C.pyi").read_text())
    optional = set() if extension.cuda_architectures else {name for name in stub if name.startswith("cuda_")}
    there = {name for name in vars(extension) if not name.startswith("_")}
    assert stub - optional <= there <= stub


def test_the_cuda_part_answers() -> None:
    """Linked statically it loads on any machine, and says how many devices the driver shows, or why it shows none."""
    extension = native.extension()
    if not extension.cuda_architectures:
        pytest.skip("the extension was built without CUDA")
    count = extension.cuda_device_count()
    if ctypes.util.find_library("cuda") is None:
        assert count == -35  # no driver
    elif torch.version.cuda is not None:
        assert max(count, 0) == torch.cuda.device_count()


def force(name: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, because the choice is made once. It loads the file alone: the extension needs no torch."""
    script = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('_C', sys.argv[1]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.instruction_set(), 'torch' in sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, native.extension().__file__],
        env={**os.environ, "FASTKD_CPU_ISA": name},
        capture_output=True,
        text=True,
    )


@pytest.mark.native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_a_forced_instruction_set_is_the_active_one(name: str) -> None:
    run = force(name)
    if run.returncode != 0 and "this processor does not have it" in run.stderr:
        pytest.skip(f"this processor does not have {name}")
    assert run.stdout.split() == [name, "False"], run.stderr


@pytest.mark.native
def test_this_run_has_the_instruction_set_that_was_asked_for() -> None:
    """Without it a run with FASTKD_CPU_ISA=generic could test the same kernels once more."""
    asked = os.environ.get("FASTKD_CPU_ISA")
    active = native.extension().instruction_set()
    assert active == asked if asked else active in INSTRUCTION_SETS


@pytest.mark.native
def test_an_unknown_instruction_set_is_an_error_that_names_the_choices() -> None:
    run = force("bogus")
    assert run.returncode != 0
    assert f"FASTKD_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got 'bogus'" in run.stderr


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("fastkd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weak_symbols(cxx: list[str], flags: tuple[str, ...], source: Path, target: Path) -> list[str]:
    """Those of which the linker keeps one copy out of several units'."""
    subprocess.run([*cxx, *flags, "-c", str(source), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f]+ [WVu] (.*)$", symbols, re.MULTILINE)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_an_instruction_set_shares_no_function_with_other_units(name: str, build: ModuleType, tmp_path: Path) -> None:
    """A shared inline function compiled for AVX-512 could be the copy that an old processor gets."""
    (unit,) = (unit for unit in build.cxx_units() if unit.stem == name)
    assert weak_symbols(build.find_cxx(), build.cxx_flags(unit), unit, tmp_path / "unit.o") == []


def test_a_shared_function_would_be_seen(build: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "shared.cpp"
    source.write_text("inline int shared(int x) { return x + 1; }\nint (*pointer)(int) = shared;\n")
    assert weak_symbols(build.find_cxx(), build.CXX_FLAGS, source, tmp_path / "unit.o") == ["shared(int)"]


def test_only_its_own_unit_is_compiled_for_an_instruction_set(build: ModuleType) -> None:
    for unit in build.cxx_units():
        special = {flag for flag in build.cxx_flags(unit) if flag.startswith("-m")}
        assert bool(special) == (unit.stem in build.ISA_FLAGS), unit


FAKE_NVCC = """#!/bin/sh
case "$*" in
*--list-gpu-arch*) echo compute_80 compute_90 ;;
*-dryrun*) echo "#$ $*" >&2; echo "#$ TOP=/no/such/toolkit" >&2 ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ({}, ""),
        ({"CXX": "g++"}, " -ccbin g++"),
        ({"CXX": "ccache g++ -Werror"}, " -ccbin g++"),
        ({"CXX": "/opt/sccache /opt/g++"}, " -ccbin /opt/g++"),
        ({"CXX": "clang++", "NVCC_CCBIN": "g++"}, ""),
        ({"NVCC_CCBIN": "g++"}, ""),
    ],
    ids=str,
)
def test_nvcc_is_given_the_compiler_that_was_named(
    environment: dict[str, str], host: str, build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own choice may be a gcc too new for it."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    for name in ("CXX", "NVCC_CCBIN", "FASTKD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "CUDA_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: f"{path}/{name}" if path else name)
    asked: list[str] = []
    monkeypatch.setattr(build, "ask", lambda *words, ask=build.ask: asked.append(words) or ask(*words))
    rules = build.ninja_file(tmp_path, tmp_path / "target.so")
    assert f"rule nvcc\n  command = {nvcc}{host} $flags" in rules
    assert f"rule cxx\n  command = {environment.get('CXX', 'g++')} $flags" in rules
    assert all(" ".join(words[0]) == f"{nvcc}{host}" for words in asked), "nvcc looks for its compiler when asked, too"
    assert len(asked) == 2


def build_extension(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    where = ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *where],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "fastkd needs a C++17 compiler, and there is no 'no-such-compiler'"),
        ({"CXX": "false", "FASTKD_CUDA": "0"}, "fastkd: the extension did not build"),
        ({"FASTKD_CUDA": "yes"}, "FASTKD_CUDA must be one of 0, 1, auto, got 'yes'"),
        ({"FASTKD_CUDA": "1", "CUDA_HOME": "/nowhere"}, "FASTKD_CUDA=1, but there is no nvcc under CUDA_HOME=/nowhere"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_build_that_cannot_be_is_loud(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    run = build_extension(tmp_path, **environment)
    assert run.returncode != 0
    assert message in run.stderr


def test_the_extension_can_be_left_out(tmp_path: Path) -> None:
    run = build_extension(tmp_path, FASTKD_NO_EXT="1", CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("*.so"))
