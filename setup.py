"""Builds the extension fastkd._C: C++ for the CPU, one unit per instruction set, and CUDA where nvcc is. No torch.

FASTKD_NO_EXT=1 skips the extension, FASTKD_CUDA=0 or 1 forbids or demands the CUDA units (default: if nvcc is found).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# A unit per instruction set: its flags must reach no other unit (see csrc/cpu/vec.h).
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    # gcc 12's own AVX-512 header trips over its use of undefined values.
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized",
}
CUDA_ARCHITECTURES = (80, 90, 100, 120)
X86 = platform.machine() in ("x86_64", "AMD64")


def cpu_units() -> list[Path]:
    units = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    return [unit for unit in units if X86 or unit.stem not in ISA_FLAGS]


def find_nvcc() -> str | None:
    wanted = os.environ.get("FASTKD_CUDA", "auto")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise RuntimeError("fastkd: FASTKD_CUDA=1, but there is no nvcc on the PATH or under CUDA_HOME")
    return None if wanted == "0" else nvcc


def toolkit(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself sees it (on the PATH it may be a wrapper)."""
    probe = subprocess.run([nvcc, "-dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    return Path(next(line for line in probe.stderr.splitlines() if "TOP=" in line).split("TOP=")[1].strip())


def quote(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(build: Path, target: Path) -> str:
    includes = " ".join(f"-I{quote(p)}" for p in (Path(sysconfig.get_path("include")), Path(pybind11.get_include())))
    cxx, nvcc = os.environ.get("CXX", "g++"), find_nvcc()
    cflags = f"-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra {includes}"
    libraries = "-fopenmp -Wl,--exclude-libs,ALL"
    units = [(unit, "cxx", ISA_FLAGS.get(unit.stem, "")) for unit in cpu_units()]
    if nvcc is not None:
        cflags += f' -DFASTKD_WITH_CUDA=\\"{",".join(map(str, CUDA_ARCHITECTURES))}\\"'
        library_folders = [toolkit(nvcc) / folder for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]
        folders = " ".join(f"-L{quote(folder)}" for folder in library_folders if folder.is_dir())
        libraries += f" {folders} -lcudart_static -lrt -lpthread -ldl"
        units += [(unit, "nvcc", "") for unit in sorted((CSRC / "cuda").glob("*.cu"))]
    archs = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES)
    archs += f" -gencode arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}"
    objects = [(build / f"{unit.stem}.o", rule, unit.resolve(), flags) for unit, rule, flags in units]
    return "\n".join(
        [
            f"rule cxx\n  command = {cxx} {cflags} $isa -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule nvcc\n  command = {nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {archs} -c $in -o $out",
            f"rule link\n  command = {cxx} -shared $in -o $out {libraries}",
            *(f"build {quote(o)}: {rule} {quote(source)}\n  isa = {flags}" for o, rule, source, flags in objects),
            f"build {quote(target)}: link {' '.join(quote(o) for o, *_ in objects)}",
            "",
        ]
    )


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, target))
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.run([*command, "-C", str(build)], check=True)


if __name__ == "__main__":
    wanted = sys.platform == "linux" and os.environ.get("FASTKD_NO_EXT") != "1"
    extensions = [Extension("fastkd._C", [str(unit) for unit in cpu_units()])] if wanted else []
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
