"""The layout: who may import whom, what is public, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raylm

PACKAGE = Path(raylm.__file__).parent

LAYERS = [
    {"_version", "heap", "parent", "ports", "tasks"},
    {"errors", "messages", "statistics"},
    {"config", "template", "models"},
    {"engines"},
    {"actors"},
    {"routing", "stream", "link", "pool", "conversation", "served"},
    {"chatbot"},
    {"api", "batch", "data", "serve"},
    {"cli", "demo", "compat", "operate"},
]
"""A module imports from its own layer and the ones above it in this list, never from one below."""


def layer_of(module: str) -> int:
    """Return the number of a module's layer."""
    top = module.split(".")[1]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def imports_of(file: Path) -> set[str]:
    """Return every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = sorted(
    ".".join(("raylm", *file.relative_to(PACKAGE).with_suffix("").parts))
    for file in PACKAGE.rglob("*.py")
    if file != PACKAGE / "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    """No module imports from a layer below its own."""
    file = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
    mine = [name for name in imports_of(file) if name.startswith("raylm.")]
    assert [name for name in mine if layer_of(name) > layer_of(module)] == []


@pytest.mark.parametrize("library", ["openvino_genai", "lmdeploy", "tritonclient", "redis"])
def test_one_importer_for_each_engine_library(library: str) -> None:
    """Each engine's library is imported in one file at most; what makes lmdeploy run on CPU is a file of its own."""
    importers = {file.name for file in PACKAGE.rglob("*.py") if any(n.startswith(library) for n in imports_of(file))}
    assert len(importers - {"lmdeploy_cpu.py"}) <= 1


def test_engines_know_nothing_of_ray() -> None:
    """No engine imports Ray, but the one whose library runs its ranks as Ray actors, in its child process."""
    importers = [file.name for file in (PACKAGE / "engines").glob("*.py") if "ray" in imports_of(file)]
    assert importers == ["lmdeploy_worker.py"]


def test_import_is_light() -> None:
    """`import raylm` loads neither Ray nor an engine's library."""
    code = "import raylm, sys; print([name for name in ('ray', 'openvino_genai', 'pydantic') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    """Every name in `__all__` can be imported, and `__all__` is sorted."""
    assert [name for name in raylm.__all__ if getattr(raylm, name, None) is None] == []
    assert raylm.__all__ == sorted(raylm.__all__)
