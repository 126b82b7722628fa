"""No line of the package runs code from a file, a model or a shell, reliability item S02."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN_MODULES = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "yaml"}
FORBIDDEN_BUILTINS = {"eval", "exec"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "jinja2.Template"}
# Chat templates run only in transformers' sandbox, our own page in one made on the spot; a plain
# environment may parse templates, but not run them.
FORBIDDEN_METHODS = {"from_string", "get_template"}
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}
# Loaders of transformers that run a model's own code unless they are told not to, or ask on stdin.
AUTO_LOADERS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def import_faults(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        modules = [node.module or ""]
        if node.module == "jinja2" and "Template" in {alias.name for alias in node.names}:
            yield "from jinja2 import Template"
    for module in modules:
        if module.split(".")[0] in FORBIDDEN_MODULES:
            yield f"import {module}"


def in_sandbox(function: ast.expr) -> bool:
    """Say whether a method is the sandbox's own, or called on one that is made on the spot."""
    value = function.value if isinstance(function, ast.Attribute) else None
    owner = value.func if isinstance(value, ast.Call) else value
    return owner is not None and dotted(owner) == "ImmutableSandboxedEnvironment"


def call_faults(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    method = name.rpartition(".")[2]
    is_open = method in FORBIDDEN_METHODS and not in_sandbox(node.func)
    if name in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS or is_open:
        yield f"{name}()"
    for keyword, forbidden in FORBIDDEN_KEYWORDS.items():
        value = keywords.get(keyword)
        if isinstance(value, ast.Constant) and value.value is forbidden:
            yield f"{keyword}={forbidden}"
    safe = keywords.get("weights_only")
    if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
        yield "torch.load without weights_only=True"
    loader = name.rpartition(".")[0]
    if method in ("from_pretrained", "from_config") and loader in AUTO_LOADERS:
        has_splat = None in keywords
        if "trust_remote_code" not in keywords and not has_splat:
            yield f"{name} without an explicit trust_remote_code"


def faults(source: str) -> list[str]:
    """Return what is forbidden in Python text, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [f"line {node.lineno}: {fault}" for fault in import_faults(node)]
        elif isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {fault}" for fault in call_faults(node)]
    return found


def test_the_package_is_clean():
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        here = faults(path.read_text(encoding="utf-8"))
        if here:
            found[str(path.relative_to(ROOT))] = here
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "import pickle",
        "from dill import loads",
        "import yaml",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "from jinja2 import Template",
        "jinja2.Environment().from_string(text)",
        "sandbox.from_string(text)",
        "jinja2.Template(text)",
    ],
)
def test_unsafe_code_is_seen(source):
    assert len(faults(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)",
        "subprocess.run(command, check=True)",
        "import ruamel.yaml",
        "ImmutableSandboxedEnvironment(autoescape=True).from_string(text)",
        "ImmutableSandboxedEnvironment.from_string(environment, text)",
    ],
)
def test_safe_code_passes(source):
    assert faults(source) == []


def test_one_file_reads_the_environment():
    readers = [
        path.relative_to(ROOT / "src" / "llmtuner").as_posix()
        for path in sorted((ROOT / "src").rglob("*.py"))
        if "os.environ" in (text := path.read_text(encoding="utf-8")) or "os.getenv" in text
    ]
    assert readers == ["extras/env.py"]
