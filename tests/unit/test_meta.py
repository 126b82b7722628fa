"""The house rules that a machine can check: layers, registries, sizes, light imports."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmtuner
from llmtuner.extras.registry import Registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "llmtuner"
LAYERS = {
    "extras": 0,
    "hparams": 1,
    "data": 2,
    "model": 2,
    "inference": 3,
    "eval": 4,
    "rag": 4,
    "train": 5,
    "agent": 5,
    "service": 6,
    "cli": 7,
}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


def source_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported_packages(source: str) -> set[str]:
    """Return the packages of llmtuner that Python text imports, at any depth of the text."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    found = {name.split(".")[1] for name in names if name.startswith("llmtuner.")}
    return found & set(LAYERS)  # the rest is a name such as __version__, not a package


def layer_faults(package: str, source: str) -> set[str]:
    """Return the imported packages that `package` must not know."""
    others = imported_packages(source) - {package}
    return {name for name in others if LAYERS[name] >= LAYERS[package]}


def function_sizes(source: str) -> dict[str, int]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in found}


def registries() -> list[Registry]:
    """Return every registry that a package of llmtuner declares."""
    found = []
    for info in pkgutil.walk_packages(llmtuner.__path__, "llmtuner."):
        if info.ispkg:
            values = vars(importlib.import_module(info.name)).values()
            found += [value for value in values if isinstance(value, Registry)]
    return found


REGISTRIES = registries()
ENTRIES = [
    pytest.param(registry, name, id=f"{registry.kind}: {name}")
    for registry in REGISTRIES
    for name in registry.names()
]


def test_every_package_has_a_layer():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= set(LAYERS)


def test_only_the_packages_are_at_the_top():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("package", [name for name in LAYERS if (PACKAGE / name).is_dir()])
def test_imports_point_down(package):
    faults = {}
    for path in source_files(PACKAGE / package):
        found = layer_faults(package, path.read_text(encoding="utf-8"))
        if found:
            faults[str(path.relative_to(ROOT))] = sorted(found)
    assert not faults


@pytest.mark.parametrize(
    ("package", "source", "faults"),
    [
        ("hparams", "from llmtuner.extras.errors import ConfigError", set()),
        ("data", "import llmtuner.model.load", {"model"}),
        ("data", "def f():\n    from llmtuner import train", {"train"}),
        ("cli", "from llmtuner.train.workflow import run", set()),
    ],
)
def test_the_layer_check_sees_wrong_imports(package, source, faults):
    assert layer_faults(package, source) == faults


def test_registries_are_found():
    kinds = {registry.kind for registry in REGISTRIES}
    assert {"dataset format", "finetuning method", "stage"} <= kinds
    assert all(registry.names() for registry in REGISTRIES)


@pytest.mark.parametrize(("registry", "name"), ENTRIES)
def test_registry_entry_loads(registry, name):
    assert registry.get(name) is not None
    assert registry.module(name).__doc__, "an entry opens with its purpose"


def test_files_are_short():
    folders = [ROOT / name for name in ("src", "tests", "tools")]
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in source_files(*folders)
    }
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}


def test_functions_are_short():
    too_long = {}
    for path in source_files(ROOT / "src", ROOT / "tests", ROOT / "tools"):
        for name, size in function_sizes(path.read_text(encoding="utf-8")).items():
            if size > MAX_FUNCTION_LINES:
                too_long[f"{path.relative_to(ROOT)} {name}"] = size
    assert not too_long


def test_function_sizes_count_lines():
    assert function_sizes("def f():\n    x = 1\n    return x\n") == {"f:1": 3}


def heavy_modules_after(statement: str) -> str:
    """Return which of the slow libraries a fresh interpreter holds after `statement`."""
    heavy = ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib")
    script = f"import sys; {statement}; print(*[n for n in {heavy} if n in sys.modules])"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "src")
    return result.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["llmtuner", "llmtuner.cli.main", "llmtuner.hparams.parser", "llmtuner.hparams.config"],
)
def test_import_is_light(module):
    assert heavy_modules_after(f"import {module}") == ""


def test_heavy_imports_are_seen():
    assert "accelerate" in heavy_modules_after("sys.modules['accelerate'] = 1")
