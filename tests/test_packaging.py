"""The package as users get it: what an editable install and a wheel hold, and the optional CUDA extension."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastsae

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ,
    reason="needs nvcc to compile the extension",
)


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, so that no test writes into the checkout."""
    copy = tmp_path / "tree"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("fastsae", "kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def no_nvcc():
    """An environment in which the build finds no nvcc."""
    kept = [
        folder for folder in os.environ["PATH"].split(os.pathsep) if not shutil.which("nvcc", path=folder)
    ]
    return {**os.environ, "PATH": os.pathsep.join(kept), "CUDA_HOME": ""}


def run(command: list, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def build_ext(tree: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """setup.py's own part of a build, without pip around it."""
    return run([sys.executable, "setup.py", "build_ext", "--build-lib", "out"], tree, env)


def build_wheel(tree: Path, env: dict[str, str]) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "out",
        ".",
    ]
    result = run(command, tree, env)
    assert result.returncode == 0, result.stdout
    (wheel,) = (tree / "out").glob("*.whl")
    return wheel


def source_of(package: str) -> Path:
    """The folder a package is mapped from."""
    folders = SETUPTOOLS["package-dir"]
    return ROOT / (folders[package] if package in folders else package.replace(".", "/"))


def test_the_mapped_packages_resolve_to_their_folders():
    if Path(fastsae.__file__).parent != ROOT / "fastsae":
        pytest.skip("not an editable install")
    for package in ("fastsae.kernels", "fastsae.benchmarks"):
        assert Path(importlib.util.find_spec(package).origin) == source_of(package) / "__init__.py"


def test_kernels_is_no_package_of_ours():
    """transformers imports a package named kernels when there is one: our folder must not pass for it."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    for flags in ([], ["-I"]):  # with and without the working directory on sys.path
        result = run([sys.executable, *flags, "-c", code], ROOT, dict(os.environ))
        assert result.returncode == 0, result.stdout
        assert not result.stdout.startswith(str(ROOT / "kernels")), result.stdout


def test_every_subpackage_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastsae").rglob("__init__.py")
    }
    assert found | {"fastsae.kernels", "fastsae.benchmarks"} == set(SETUPTOOLS["packages"])
    assert all((source_of(package) / "__init__.py").is_file() for package in SETUPTOOLS["packages"])


def test_pins_agree():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    canonical = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    requirements = [*PROJECT["project"]["dependencies"], *EXTRAS["demo"], *EXTRAS["test"], *EXTRAS["dev"]]
    for requirement in requirements:
        name, pin = re.match(r"([\w.-]+)(?:==([\w.]+))?", requirement).groups()
        assert name.lower() in canonical, f"{name} is not in constraints.txt"
        assert pin in (None, canonical[name.lower()]), requirement
    hooks = re.findall(r"\[(ruff|clang-format)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    assert all(canonical[name] == version for name, version in hooks)


def test_a_wheel_holds_every_file(tree, no_nvcc):
    """Also without nvcc: a pure wheel then, which any Python can install."""
    wheel = build_wheel(tree, no_nvcc)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"fastsae/py.typed", "fastsae/kernels/__init__.py", "fastsae/benchmarks/__init__.py"} <= names
    assert not any(name.startswith(("kernels/", "benchmarks/", "tests/", "csrc/")) for name in names)
    for package in SETUPTOOLS["packages"]:
        for path in source_of(package).iterdir():
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                assert f"{package.replace('.', '/')}/{path.name}" in names


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FASTSAE_BUILD_CUDA", "yes", "FASTSAE_BUILD_CUDA must be auto, 0 or 1, got 'yes'."),
        (
            "FASTSAE_CUDA_ARCHS",
            "sm_90",
            "FASTSAE_CUDA_ARCHS must be architectures separated by semicolons",
        ),
        ("FASTSAE_CUDA_ARCHS", "", "FASTSAE_CUDA_ARCHS must be architectures separated by semicolons"),
    ],
)
def test_bad_settings_are_named(tree, name, value, message):
    result = build_ext(tree, {**os.environ, name: value})
    assert result.returncode != 0
    assert result.stdout.startswith(message)
    assert "Traceback" not in result.stdout


def test_without_nvcc_the_extension_is_skipped(tree, no_nvcc):
    result = build_ext(tree, {**no_nvcc, "FASTSAE_BUILD_CUDA": "auto"})
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if "CUDA" in line]
    assert lines == ["fastsae: skipping the CUDA extension: nvcc is neither in CUDA_HOME nor on PATH."]
    assert not list(tree.rglob("*.so"))


def test_without_nvcc_asking_for_the_extension_fails(tree, no_nvcc):
    result = build_ext(tree, {**no_nvcc, "FASTSAE_BUILD_CUDA": "1"})
    assert result.returncode != 0
    assert result.stdout.strip() == (
        "FASTSAE_BUILD_CUDA=1 asks for the CUDA extension, but nvcc is neither in CUDA_HOME nor on PATH."
    )


@needs_nvcc
def test_switched_off_is_off(tree):
    result = build_ext(tree, {**os.environ, "FASTSAE_BUILD_CUDA": "0"})
    assert result.returncode == 0, result.stdout
    assert not list(tree.rglob("*.so"))


@needs_nvcc
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_a_source_that_does_not_compile(tree, mode):
    (tree / "csrc" / "bindings.cpp").write_text("#error broken\n")
    result = build_ext(tree, {**os.environ, "FASTSAE_BUILD_CUDA": mode})
    assert "#error broken" in result.stdout
    assert "fastsae._cuda did not compile" in result.stdout
    assert (result.returncode == 0) == (mode == "auto")


@needs_nvcc
@pytest.mark.slow
def test_the_extension_builds_and_runs_without_torch(tree):
    wheel = build_wheel(tree, {**os.environ, "FASTSAE_BUILD_CUDA": "1"})
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (name for name in archive.namelist() if name.startswith("fastsae/_cuda."))
        archive.extract(library, tree)
    # -I -S: no site-packages, so nothing of torch can be what makes it load.
    code = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('fastsae._cuda', sys.argv[1])\n"
        "cuda = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cuda)\n"
        "print(cuda.runtime_version())\n"
        "for call in (cuda.driver_version, cuda.device_count):\n"
        "    try:\n"
        "        print(call())\n"
        "    except RuntimeError as error:\n"
        "        print('RuntimeError:', error)\n"
    )
    result = run([sys.executable, "-I", "-S", "-c", code, str(tree / library)], tree, dict(os.environ))
    assert result.returncode == 0, result.stdout
    runtime, driver, devices = result.stdout.splitlines()
    assert int(runtime) >= 11000
    if shutil.which("nvidia-smi"):
        assert int(driver) >= int(runtime) // 1000 * 1000
        assert int(devices) >= 1
    else:
        assert driver == devices == "RuntimeError: no NVIDIA driver is installed"
