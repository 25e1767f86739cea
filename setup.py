"""The optional CUDA extension ``fastsae._cuda``; the rest of the packaging is in pyproject.toml.

nvcc compiles csrc/*.cu and g++ the bindings. They pass raw pointers, so the build needs no torch and its
result fits every torch. The CUDA runtime is linked statically.

    FASTSAE_BUILD_CUDA   auto (default): build it if the compilers are there; 0: don't; 1: build it or fail
    FASTSAE_CUDA_ARCHS   architectures to compile for, default "80;90a"
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Fixed, where setuptools' own build folder is a new one each time: ninja then recompiles only what changed.
BUILD = ROOT / "build" / "cuda"

NINJA_FILE = """\
rule nvcc
  command = {nvcc} {nvcc_flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cxx
  command = {cxx} {cxx_flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart static $in -o $out
{builds}
"""


def build_mode() -> str:
    mode = os.environ.get("FASTSAE_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FASTSAE_BUILD_CUDA must be auto, 0 or 1, got {mode!r}.")
    return mode


def cuda_archs() -> list[str]:
    value = os.environ.get("FASTSAE_CUDA_ARCHS", "80;90a")
    archs = value.split(";")
    if not all(re.fullmatch(r"[1-9]\d{1,2}[af]?", arch) for arch in archs):
        raise SystemExit(
            f"FASTSAE_CUDA_ARCHS must be architectures separated by semicolons, as '80;90a', got {value!r}."
        )
    return archs


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def find_ninja() -> str | None:
    """On PATH, or beside a Python whose environment isn't activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def missing_tool() -> str | None:
    """What the build lacks, or None."""
    if find_nvcc() is None:
        return "nvcc is neither in CUDA_HOME nor on PATH"
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    if find_ninja() is None:
        return "ninja is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def nvcc_arch_flags(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [int(arch) for arch in archs if arch.isdigit()]
    if portable:  # PTX of the newest portable one, which the driver compiles for GPUs newer than the list
        flags.append(f"-gencode=arch=compute_{max(portable)},code=compute_{max(portable)}")
    return flags


class BuildCuda(build_ext):
    """Compiles an extension with ninja; setuptools turns a CompileError of an optional one into a warning."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        common = "-O3 -std=c++17"
        host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        objects, builds = [], []
        for source in map(Path, ext.sources):
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            objects.append(f"{source.name}.o")
            builds.append(f"build {objects[-1]}: {rule} {quote(str(ROOT / source))}")
        builds.append(f"build {target.name}: link {' '.join(objects)}")
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text(
            NINJA_FILE.format(
                nvcc=find_nvcc(),
                nvcc_flags=" ".join(
                    [common, "-lineinfo", f"-Xcompiler={host}", *nvcc_arch_flags(cuda_archs())]
                ),
                cxx=shutil.which("g++"),
                cxx_flags=" ".join(
                    [common, host.replace(",", " "), *(f"-isystem '{path}'" for path in includes)]
                ),
                builds="\n".join(builds),
            )
        )
        try:
            subprocess.run([find_ninja(), "-C", str(BUILD), target.name], check=True)
        except subprocess.CalledProcessError as error:
            if self.editable_mode:  # an earlier build must not pass for this one
                for stale in (ROOT / "fastsae").glob("_cuda.*.so"):
                    stale.unlink()
            raise CompileError(
                "fastsae._cuda did not compile (the compiler's message is above); "
                "FASTSAE_BUILD_CUDA=0 installs without it."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(BUILD / target.name, target)


def quote(path: str) -> str:
    """Escape a path for a build line of ninja."""
    return re.sub(r"([$ :])", r"$\1", path)


def extensions() -> list[Extension]:
    mode = build_mode()
    cuda_archs()
    if mode == "0":
        return []
    reason = missing_tool()
    if reason is not None:
        if mode == "1":
            raise SystemExit(f"FASTSAE_BUILD_CUDA=1 asks for the CUDA extension, but {reason}.")
        print(f"fastsae: skipping the CUDA extension: {reason}.", file=sys.stderr)
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.iterdir() if path.suffix in (".cpp", ".cu"))
    return [Extension("fastsae._cuda", sources, optional=mode == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda})
