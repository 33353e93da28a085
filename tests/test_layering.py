"""Who may import whom: wings in an order, and between wings only what stands in their doors."""

import ast
import importlib
from pathlib import Path

import alds_fast

PACKAGE = Path(alds_fast.__file__).parent
WINGS = (
    *("linalg", "kernels", "layers", "measurement", "integrations"),
    *("criteria", "allocation", "factors", "planning"),
    *("deployment", "checkpoints", "retraining", "evaluation", "cli"),
)
LEAVES = ("errors", "files", "text", "version")


def _imports(path):
    """Absolute names, inside of the package, of the modules and names that a file imports."""
    here = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*here[: len(here) - node.level], *(node.module.split(".") if node.module else ()))
            yield from ((module, alias.name) for alias in node.names)


def test_wings_import_from_doors_of_earlier_wings():
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        own = path.relative_to(PACKAGE).parts[0]
        for module, name in _imports(path):
            wing, *inside = module or (name,)
            if wing == own or wing in LEAVES or (not module and name in LEAVES):
                continue
            assert WINGS.index(wing) < WINGS.index(own), f"{path}: {wing}"
            assert not inside, f"{path} imports past the door of {wing}"
            assert not module or name in importlib.import_module(f"alds_fast.{wing}").__all__, f"{path}: {name}"


def test_no_first_party_import_inside_a_function():
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                inside = [n for n in ast.walk(function) if isinstance(n, ast.ImportFrom) and n.level]
                assert not inside, f"{path}: {function.name}"


def test_modules_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 260, path.name
