"""The house's own rules: who imports whom, what a file may hold, and that what README.md shows runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import logit_problems
import pytest

import fastkd
from fastkd import _rows
from fastkd.reference import logit

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root, package in ((ROOT, "fastkd"), (ROOT / "kernels", "fastkd_kernels"))
    for path in sorted((root / package).rglob("*.py"))
}
IMPLEMENTATIONS = ("fastkd_kernels", "fastkd.native", "fastkd.algebra", "fastkd.reference")
# Above the public losses. Everybody else is below them.
USERS = ("fastkd.cli", "fastkd.compat", "fastkd.demo", "fastkd.distill")
ENVIRONMENT = {"FASTKD_CPU_ISA", "TRITON_INTERPRET"}
BUILD_ENVIRONMENT = {"FASTKD_NO_EXT", "FASTKD_CUDA", "CUDA_HOME", "CXX", "NVCC_CCBIN", "PATH"}
BENCH_ENVIRONMENT = ENVIRONMENT | {"FASTKD_DRY_RUN"}
MAX_LINES = 430
MAX_FUNCTION = 60
# A Triton kernel: its variables are the row's running numbers, and a helper would take and return all of them.
LONG_FUNCTIONS = {"kernels/fastkd_kernels/row_values.py: statistics"}


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imports(module: str, source: str, is_package: bool) -> Iterator[str]:
    """Absolute names, those given as strings to importlib too; ``from a import b`` is a.b, which may be a module."""
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"fastkd(_kernels)?(\.\w+)*", str(node.value)):
            yield node.value


def imported_by(module: str) -> set[str]:
    path = SOURCES[module]
    return set(imports(module, path.read_text(), path.name == "__init__.py"))


def test_imports_are_seen_in_every_form() -> None:
    source = (
        "import a.b\nfrom . import c\nfrom .. import d\nfrom ..e import f\nimportlib.import_module('fastkd.native')"
    )
    assert set(imports("p.q.r", source, False)) == {"a.b", "p.q.c", "p.d", "p.e.f", "fastkd.native"}
    assert set(imports("p.q", "from . import c", True)) == {"p.q.c"}


@pytest.mark.parametrize("module", SOURCES)
def test_dependencies_point_one_way(module: str) -> None:
    """losses -> _dispatch -> {fastkd_kernels | native | algebra | reference}."""
    for name in imported_by(module):
        if is_in(module, *IMPLEMENTATIONS):
            mine = next(package for package in IMPLEMENTATIONS if is_in(module, package))
            others = [package for package in IMPLEMENTATIONS if package != mine]
            assert not is_in(name, *others), f"{module} imports {name}: implementations never import one another"
            assert not is_in(name, "fastkd._dispatch"), f"{module} imports {name}: it is chosen, it does not choose"
        elif is_in(module, *USERS) and name == "fastkd.native":
            pass  # to ask whether it is there is not to pick it
        elif module != "fastkd._dispatch":
            assert not is_in(name, *IMPLEMENTATIONS), f"{module} imports {name}: only fastkd._dispatch picks"
        if is_in(module, "fastkd_kernels"):
            assert not is_in(name, "fastkd"), f"{module} imports {name}: the kernels know nothing of fastkd"
        if module != "fastkd" and not is_in(module, "fastkd.losses", *USERS):
            assert not is_in(name, "fastkd.losses"), f"{module} imports {name}: nobody below the losses imports them"


def test_the_extension_includes_no_torch_header() -> None:
    includes = {
        path: re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file()
    }
    assert any(includes.values())
    for path, names in includes.items():
        for name in names:
            assert not name.startswith(("torch/", "ATen/", "c10/", "caffe2/")), f"{path} includes {name}"
            if path.parent != ROOT / "csrc":
                assert not name.startswith(("pybind11/", "Python.h")), f"{path} includes {name}: only csrc/*.cpp bind"


def test_every_list_of_divergences_is_complete() -> None:
    """In the same order: C++ knows them by number."""
    (enum,) = re.findall(r"enum class Divergence : \w+ {([^}]*)}", (ROOT / "csrc" / "cpu" / "logit.h").read_text())
    assert tuple(name.strip() for name in enum.split(",")) == _rows.DIVERGENCES
    assert {*logit.DIVERGENCES, "mse"} == set(_rows.DIVERGENCES)
    assert logit_problems.DIVERGENCES == _rows.DIVERGENCES, "the tests go by this list"


def public_packages() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(fastkd.__path__) if m.ispkg and m.name != "demo"]  # an extra
    packages = [fastkd, *(importlib.import_module(f"fastkd.{name}") for name in names)]
    return [package for package in packages if hasattr(package, "__all__")]


def test_every_public_name_has_a_docstring() -> None:
    for package in public_packages():
        for name in package.__all__:
            value = getattr(package, name)
            if not inspect.isroutine(value) and not inspect.isclass(value):
                continue
            # Neither a parent's nor the one that a tuple or a dataclass gets by itself.
            own = value.__doc__ and not value.__doc__.startswith(f"{name}(")
            assert own, f"{package.__name__}.{name} has no docstring"


def test_files_stay_short() -> None:
    files = [
        path
        for folder in ("fastkd", "kernels", "csrc", "tests", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 20
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each; docstring and decorators do not count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def test_functions_stay_short() -> None:
    assert dict(functions("@d\ndef f(\n    x,\n):\n    '''a\n    b'''\n    return x\n")) == {"f": 4}
    files = [path for folder in ("fastkd", "kernels", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    seen = [
        (lines, f"{path.relative_to(ROOT)}: {name}")
        for path in [*files, ROOT / "setup.py"]
        for name, lines in functions(path.read_text())
    ]
    assert len(seen) > 200
    assert {where for lines, where in seen if lines > MAX_FUNCTION} == LONG_FUNCTIONS


def variables_read(source: str) -> set[str]:
    """The environment variables named in Python or C++; one that is not named in place shows as ``?``."""
    named = re.compile(r"""(?:environ(?:\.\w+\(|\[)|getenv\()\s*["'](\w+)["']""")
    code = re.sub(r"^(?:(?:import|from) [^;\n]*|\s*#.*|\s*//.*)$", "", source, flags=re.MULTILINE)
    names = named.findall(code)
    return {*names, *(["?"] if len(re.findall(r"\benviron\b|\bgetenv\b", code)) > len(names) else [])}


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("fastkd", ENVIRONMENT),
        ("kernels", ENVIRONMENT),
        ("csrc", ENVIRONMENT),
        ("bench", BENCH_ENVIRONMENT),
        ("setup.py", BUILD_ENVIRONMENT),
    ],
)
def test_no_other_environment_variable_is_read(where: str, allowed: set[str]) -> None:
    assert variables_read('os.environ.get("A"), environ["B"], std::getenv("C")') == {"A", "B", "C"}
    assert variables_read("import os; x = os.environ['A']\nos.getenv(name)") == {"A", "?"}
    path = ROOT / where
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix in (".py", ".cpp", ".h", ".cu"):
            assert variables_read(file.read_text()) <= allowed, file


HEAVY = {"triton", "sklearn", "matplotlib", "transformers", "tokenizers", "rich", "tqdm", "tensorboard"}


def test_importing_fastkd_imports_nothing_heavy() -> None:
    """Beside what torch itself brings."""
    script = (
        "import sys, torch; before = set(sys.modules); import fastkd;"
        " print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    brought = set(run.stdout.split())
    assert "fastkd" in brought
    assert brought & HEAVY == set()


README = ROOT / "README.md"


def readme_blocks(language: str) -> list[str]:
    text = README.read_text() if README.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_readme_begins_with_the_two_commands() -> None:
    """.ci/run runs the second block as it stands."""
    install, test = readme_blocks("bash")[:2]
    assert install.split("\n") == ['pip install ".[demo]"', "fastkd demo", ""]
    assert test.split("\n") == ['pip install -e ".[test]"', "pytest", ""]


def test_readme_shows_python() -> None:
    assert readme_blocks("python")


@pytest.mark.parametrize("block", range(len(readme_blocks("python"))))
def test_readme_python_runs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(readme_blocks("python")[block], f"README.md, Python block {block + 1}", "exec")
    exec(code, {"__name__": "__main__"})
