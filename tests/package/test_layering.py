"""Who may import whom: wings in an order, and between wings only what stands in their doors.

``problems`` takes the folder of a package, so that faults can be planted into a copy of ours.
"""

import ast
import importlib
import inspect
import re
import shutil
from pathlib import Path

import pytest

import alds_fast

PACKAGE = Path(alds_fast.__file__).parent
ROOT = PACKAGE.parent
WINGS = (
    *("linalg", "kernels", "layers", "measurement", "integrations"),
    *("criteria", "allocation", "factors", "planning"),
    *("deployment", "checkpoints", "retraining", "evaluation", "cli"),
)
LEAVES = ("checks", "errors", "files", "import_hooks", "text", "version")
LONGEST, MOST_FILES, DOOR_LINES = 260, 15, 12


def _imports(path, package):
    """(module, name) of everything first-party that a file imports, as parts of a dotted name inside the package."""
    here = path.relative_to(package).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*here[: len(here) - node.level], *(node.module.split(".") if node.module else ()))
            yield from ((module, alias.name) for alias in node.names)


def _names_of_door(package, wing):
    """``__all__`` of a wing, read and not run."""
    for node in ast.parse((package / wing / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def _between_wings(package):
    for path in sorted(package.glob("*/**/*.py")):
        own = path.relative_to(package).parts[0]
        for module, name in _imports(path, package):
            wing, *inside = module or (name,)
            if wing == own or wing in LEAVES:
                continue
            if wing not in WINGS or WINGS.index(wing) > WINGS.index(own):
                yield f"{path.name} of {own} imports from {wing}, which does not stand before it"
            elif inside:
                yield f"{path.name} of {own} imports past the door of {wing}"
            elif module and name not in _names_of_door(package, wing):
                yield f"{path.name} of {own} imports {name}, which is not in the door of {wing}"


def _circles(package):
    """Modules of a wing that import each other, in any number of steps; doors hand on and do not count."""
    for wing in WINGS:
        files = {p.relative_to(package).with_suffix("").parts: p for p in (package / wing).rglob("*.py")}
        arrows = {
            own: {m for module, name in _imports(path, package) for m in (module, (*module, name)) if m in files}
            for own, path in files.items()
            if own[-1] != "__init__"
        }
        left = dict(arrows)
        while free := [own for own, others in left.items() if not others & left.keys()]:
            for own in free:
                del left[own]
        if left:
            yield f"{wing}: a circle of imports among {sorted('.'.join(n) for n in left)}"


def _inside_functions(package):
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    first_party = isinstance(node, ast.ImportFrom) and (
                        node.level or "alds_fast" in (node.module or "")
                    )
                    if first_party or (isinstance(node, ast.Import) and node.names[0].name.startswith("alds_fast")):
                        yield f"{path.name}: {function.name} imports a part of the package"


def _sizes(package):
    for path in package.rglob("*.py"):
        if (count := len(path.read_text().splitlines())) > LONGEST:
            yield f"{path.name}: {count} lines, at most {LONGEST}"
    for folder in {p.parent for p in package.glob("*/**/*.py")}:
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES:
            yield f"{folder.name}: {count} files, at most {MOST_FILES}"
        if len(folder.relative_to(package).parts) > 2:
            yield f"{folder}: more than one level inside a wing"
    for wing in WINGS:
        text = ast.get_docstring(ast.parse((package / wing / "__init__.py").read_text())) or ""
        if not 1 <= len(text.splitlines()) <= DOOR_LINES:
            yield f"{wing}: its door has a docstring of {len(text.splitlines())} lines, 1 to {DOOR_LINES}"


def problems(package):
    """Everything that breaks a rule, a line each."""
    rules = (_between_wings, _circles, _inside_functions, _sizes)
    return [text for rule in rules for text in rule(package)]


def test_the_package_keeps_the_rules():
    assert set(WINGS) == {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert problems(PACKAGE) == []


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PACKAGE, tmp_path / "alds_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")))


FAULTS = [
    ("linalg/folding.py", "from ..layers import LowRankLinear", "does not stand before it"),
    ("planning/plan.py", "from ..linalg.folding import divisors", "past the door of linalg"),
    ("planning/plan.py", "from ..linalg import no_such_name", "not in the door of linalg"),
    ("linalg/folding.py", "from .spectra_op import spectra", "a circle"),
    ("text.py", "def f():\n    from .errors import AldsError", "imports a part of the package"),
    ("text.py", "#\n" * LONGEST, "lines, at most"),
]


@pytest.mark.parametrize("file, line, message", FAULTS)
def test_a_planted_fault_is_found(copy, file, line, message):
    path = copy / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    if message == "a circle":
        path = copy / "linalg/spectra_op.py"
        path.write_text(f"{path.read_text()}\nfrom .folding import divisors\n")
    assert any(message in text for text in problems(copy))


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_examples_and_benchmarks_go_through_doors(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alds_fast."):
                module = importlib.import_module(node.module)
                door = hasattr(module, "__path__") or node.module.split(".")[1] in LEAVES
                assert door, f"{path.name} imports from {node.module}, past its door"


def test_cross_references_resolve():
    pattern = re.compile(r":(?:mod|func|class|data):`~?(?:alds_fast\.)([\w.]+)`")
    for path in PACKAGE.rglob("*.py"):
        for name in pattern.findall(path.read_text()):
            parts, found = name.split("."), alds_fast
            for i, part in enumerate(parts):
                if not hasattr(found, part) and inspect.ismodule(found):
                    importlib.import_module(".".join(("alds_fast", *parts[: i + 1])))
                assert hasattr(found, part), f"{path.name}: alds_fast.{name}"
                found = getattr(found, part)
