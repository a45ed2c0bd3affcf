"""Builds the extension fastkd._C: C++ for the CPU, one unit per instruction set, and CUDA where nvcc is. No torch.

FASTKD_NO_EXT=1 skips the extension. FASTKD_CUDA=0 or 1 forbids or demands the CUDA units (auto: if nvcc is found, under
CUDA_HOME or on the PATH). CXX names the compiler, for nvcc too unless NVCC_CCBIN does; CXXFLAGS is not read, since a
-march would reach the generic unit.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
CXX_FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra")
LINK_FLAGS = ("-shared", "-fopenmp", "-Wl,--exclude-libs,ALL")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# A unit per instruction set: its flags must reach no other unit (see csrc/cpu/vec.h).
AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    # gcc 12's own AVX-512 header trips over its use of undefined values.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
)
ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": AVX512_FLAGS,
    "avx512vnni": (*AVX512_FLAGS, "-mavx512vnni"),
}
LAUNCHERS = ("ccache", "distcc", "icecc", "sccache")  # they may stand before the compiler in CXX
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
X86 = platform.machine() in ("x86_64", "AMD64")


def cxx_units() -> list[Path]:
    units = [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]
    return [unit for unit in units if X86 or unit.stem not in ISA_FLAGS]


def cxx_flags(unit: Path) -> tuple[str, ...]:
    """csrc/*.cpp are the bindings and the only ones to see Python; csrc/cpu/*.cpp need nothing but a compiler."""
    python = (f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}")
    return (*CXX_FLAGS, *(python if unit.parent == CSRC else ISA_FLAGS.get(unit.stem, ())))


def find_cxx() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise CompileError(
            f"fastkd needs a C++17 compiler, and there is no {command[0]!r}: install it, name another in CXX,"
            " or set FASTKD_NO_EXT=1 to do without the C++ kernels"
        )
    return command


def find_nvcc(cxx: Sequence[str]) -> list[str] | None:
    wanted = os.environ.get("FASTKD_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise CompileError(f"FASTKD_CUDA must be one of 0, 1, auto, got {wanted!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        where = f"under CUDA_HOME={home}" if home else "on the PATH"
        raise CompileError(f"FASTKD_CUDA=1, but there is no nvcc {where}")
    if wanted == "0" or nvcc is None:
        return None
    # The gcc that nvcc takes by itself may be too new for it. NVCC_CCBIN is its own variable for another.
    if not os.environ.get("CXX") or os.environ.get("NVCC_CCBIN"):
        return [nvcc]
    return [nvcc, "-ccbin", next((word for word in cxx if Path(word).name not in LAUNCHERS), cxx[0])]


def ask(nvcc: Sequence[str], *question: str) -> str:
    answer = subprocess.run([*nvcc, *question], capture_output=True, text=True)
    if answer.returncode != 0:
        raise CompileError(f"{shlex.join(answer.args)} failed; FASTKD_CUDA=0 builds without it:\n{answer.stderr}")
    return answer.stdout + answer.stderr  # -dryrun prints to the latter


def architectures(nvcc: Sequence[str]) -> list[str]:
    """Those of ours that this nvcc knows: 100 and 120 came with CUDA 12.8."""
    names = ask(nvcc, "--list-gpu-arch").split()
    known = [architecture for architecture in CUDA_ARCHITECTURES if f"compute_{architecture}" in names]
    if not known:
        raise CompileError(
            f"{nvcc[0]} compiles for none of {', '.join(CUDA_ARCHITECTURES)}; FASTKD_CUDA=0 does without"
        )
    return known


def nvcc_flags(known: list[str]) -> tuple[str, ...]:
    """Machine code for each, and PTX of the last, which later processors compile for themselves."""
    codes = [*(f"arch=compute_{a},code=sm_{a}" for a in known), f"arch=compute_{known[-1]},code=compute_{known[-1]}"]
    return (*NVCC_FLAGS, *(f"-gencode={code}" for code in codes))


def cuda_library_flags(nvcc: Sequence[str]) -> tuple[str, ...]:
    """cudart from the toolkit's folder as nvcc itself sees it: the nvcc on the PATH may be a wrapper."""
    plan = ask(nvcc, "-dryrun", "-c", "-x", "cu", os.devnull)
    top = Path(plan.partition("TOP=")[2].partition("\n")[0].strip())
    folders = [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    return (*(f"-L{folder}" for folder in folders if folder.is_dir()), "-lcudart_static", "-lrt", "-lpthread", "-ldl")


def in_ninja(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def in_shell(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def edge(output: Path, rule: str, inputs: Sequence[Path], flags: Sequence[str]) -> str:
    return f"build {in_ninja(output)}: {rule} {' '.join(map(in_ninja, inputs))}\n  flags = {in_shell(flags)}"


def ninja_file(build: Path, target: Path) -> str:
    cxx = find_cxx()
    nvcc = find_nvcc(cxx)
    compiles = "$flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    rules = [
        f"rule cxx\n  command = {in_shell(cxx)} {compiles}",
        f"rule link\n  command = {in_shell(cxx)} $in -o $out $flags",
    ]
    units = [(unit, "cxx", cxx_flags(unit)) for unit in cxx_units()]
    link_flags = LINK_FLAGS
    if nvcc is not None:
        known = architectures(nvcc)
        define = f'-DFASTKD_WITH_CUDA="{",".join(known)}"'
        rules.append(f"rule nvcc\n  command = {in_shell(nvcc)} {compiles}")
        units = [(unit, rule, (*flags, define) if unit.parent == CSRC else flags) for unit, rule, flags in units]
        units += [(unit, "nvcc", nvcc_flags(known)) for unit in sorted((CSRC / "cuda").glob("*.cu"))]
        link_flags += cuda_library_flags(nvcc)
    objects = [build / unit.with_suffix(f"{unit.suffix}.o") for unit, _, _ in units]
    edges = [
        edge(output, rule, [unit.resolve()], flags) for (unit, rule, flags), output in zip(units, objects, strict=True)
    ]
    return "\n".join([*rules, *edges, edge(target, "link", objects, link_flags), ""])


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, target))
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        if subprocess.run([*command, "-C", str(build)]).returncode != 0:
            raise CompileError(
                "fastkd: the extension did not build, the compiler's words are above;"
                " FASTKD_CUDA=0 leaves out CUDA, FASTKD_NO_EXT=1 the whole extension"
            )


if __name__ == "__main__":
    wanted = sys.platform == "linux" and os.environ.get("FASTKD_NO_EXT") != "1"
    extensions = [Extension("fastkd._C", [str(unit) for unit in cxx_units()])] if wanted else []
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
