"""Who may import whom: wings in an order, and between wings only what stands in their doors.

Every rule takes a house, so that faults can be planted into a copy of the texts.
"""

import ast
import functools
import importlib
import inspect
import re
from collections import defaultdict

import pytest
from support.house import ROOT, House, counts, floors, imported_by_call, imports_of

WINGS = (
    *("linalg", "kernels", "layers", "measurement", "tuning", "integrations"),
    *("blocks", "criteria", "allocation", "factors", "planning"),
    *("deployment", "checkpoints", "retraining", "evaluation", "bench", "cli"),
)
LEAVES = ("checks", "errors", "files", "import_hooks", "processes", "progress", "selection", "text", "version")
HEAVY = ("numba", "scipy", "triton", "transformers", "peft", "matplotlib", "rich", "torch._dynamo", "torch.export")
LONGEST, MOST_FILES, DOOR_LINES = 260, 12, 12
PACKAGE = ROOT / "alds_fast"
HOUSE = House.of_folder(PACKAGE)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = ("body", "cases")  # what statements that hold others have
OF_FORMATS = ("FORMAT", "VERSION")  # constants of every file that has a format of its own
OUTSIDE = ("tests", "examples", "benchmarks")
# they need the kernels themselves
COMPILES_KERNELS = [ROOT / "benchmarks" / "gpu" / file for file in ("aot.py", "launches.py")]


def dotted(module):
    return ".".join(module)


def used_of_doors(tree, imports, doors):
    """(door, name) of what a file takes from doors: imported, or as an attribute of a door that it imports."""
    imports = set(imports)
    others = {alias.name: alias.asname for node in ast.walk(tree) for alias in getattr(node, "names", ())
              if isinstance(alias, ast.alias) and alias.asname}  # fmt: skip
    modules = {others.get(name, name): (*module, name) for module, name in imports if (*module, name) in doors}
    for node in ast.walk(tree) if modules else ():
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules:
            imports.add((modules[node.value.id], node.attr))
    return {(module, name) for module, name in imports if module in doors}


def wings_and_doors(house):
    """Imports go to the own wing, to leaves, and to names in the doors of wings that stand before the own one."""
    for module in house.texts:
        for imported, name in house.imports(module):
            wing, *inside = imported or (name,)
            if module[:1] in [(leaf,) for leaf in LEAVES] and wing not in LEAVES:
                yield f"{dotted(module)} is a leaf and imports {wing}"
            elif wing in (*module[:1], *LEAVES):
                continue
            elif len(module) < 2 and wing in WINGS:  # the package's own door, and __main__
                if inside:
                    yield f"{dotted(module) or 'the door'} imports past the door of {wing}"
            elif wing not in WINGS or WINGS.index(wing) > WINGS.index(module[0]):
                yield f"{dotted(module)} imports from {wing}, which does not stand before it"
            elif inside:
                yield f"{dotted(module)} imports past the door of {wing}"
        others = {(wing,) for wing in house.wings if wing not in module[:1]}
        for door, name in used_of_doors(house.tree(module), house.imports(module), others):
            if name is not None and name not in house.names_of(door):
                yield f"{dotted(module)} uses {name}, which is not in the door of {dotted(door)}"


def own_doors(house):
    """A file takes names of its own folder from the files that define them, not from the door."""
    for module in house.texts.keys() - house.doors:
        folder = house.package(module)
        for imported, name in house.imports(module):
            from_door = imported == folder and folder and (*folder, name) not in house.texts
            if from_door or (name is not None and (*imported, name) == folder):
                yield f"{dotted(module)} imports {name} through its own door"


def circles(house):
    """Modules of a wing that import each other, in any number of steps."""
    arrows = house.arrows()
    for wing in WINGS:
        inside = {module for module in arrows if module[0] == wing}
        _, circle = floors({module: arrows[module] & inside for module in inside})
        if circle:
            yield f"{wing}: a circle of imports among {sorted(map(dotted, circle))}"


def imports_in_functions(house):
    """No import statement for a part of the package; what waits for another package is loaded by a call."""
    for module in house.texts:
        for function in (node for node in ast.walk(house.tree(module)) if isinstance(node, FUNCTIONS)):
            written = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            if list(imports_of(ast.Module(written, []), house.package(module))):
                yield f"{dotted(module)}: {function.name} imports a part of the package"


def sizes(house):
    folders = defaultdict(list)
    for module, text in house.texts.items():
        folders[house.package(module)].append(module)
        if (count := len(text.splitlines())) > LONGEST:
            yield f"{dotted(module)}: {count} lines, at most {LONGEST}"
    for folder, modules in folders.items():
        if folder and len(modules) > MOST_FILES:
            yield f"{dotted(folder)}: {len(modules)} files, at most {MOST_FILES}"
        if len(folder) > 2:
            yield f"{dotted(folder)}: more than one level inside a wing"
    for wing in WINGS:
        text = ast.get_docstring(house.tree((wing,))) or ""
        if not 1 <= len(text.splitlines()) <= DOOR_LINES:
            yield f"{wing}: its door has a docstring of {len(text.splitlines())} lines, 1 to {DOOR_LINES}"


def definitions(house):
    """A public function, class or constant is defined in one module; each file format has its name and version."""
    places = defaultdict(set)
    for module in house.texts:
        for node in statements(house.tree(module).body, itself=True):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            for name in names:
                if isinstance(name, str) and not name.startswith("_") and name not in OF_FORMATS:
                    places[name].add(dotted(module))
    for name, modules in places.items():
        if len(modules) > 1:
            yield f"{name} is defined in {' and '.join(sorted(modules))}"


@functools.cache
def used_outside():
    """What tests, examples and benchmarks take from doors."""
    trees = [ast.parse(p.read_text()) for folder in OUTSIDE for p in (ROOT / folder).rglob("*.py")]
    return set().union(*(used_of_doors(tree, imports_of(tree), HOUSE.doors - {()}) for tree in trees))


def unused_names_of_doors(house):
    """What a door hands on is used outside of its folder, or it is public; ``alds_fast.kernels`` is as a whole."""
    used = set(used_outside())
    for module in house.texts:
        of_others = {door for door in house.doors - {()} if module[: len(door)] != door}
        used |= used_of_doors(house.tree(module), house.imports(module), of_others)
    for door in sorted(house.doors - {(), ("kernels",)}):
        for name in house.names_of(door):
            if (door, name) not in used:
                yield f"{dotted(door)}: nothing outside uses {name}, which its door hands on"


def statements(body, itself=False):
    """What runs when a module is imported: nothing in functions, nothing under TYPE_CHECKING.

    With ``itself`` what functions and classes are called, and nothing in them.
    """
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, itself)
        elif itself and isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node
        elif not isinstance(node, FUNCTIONS):
            yield node
            for part in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from statements(getattr(node, part, ()), itself)


def absolute_names(node):
    """The dotted names that a node imports, but those with leading dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [] if node.level else [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [dotted(imported_by_call(node))]


def heavy_imports(house):
    """Of the modules that the doors load, none loads a heavy package. What functions load is not looked at."""
    waiting, loaded = set(house.doors), set()
    while waiting:
        module = waiting.pop()
        loaded.add(module)
        nodes = [node for node in statements(house.tree(module).body) if not any(hasattr(node, b) for b in BLOCKS)]
        inside = set(imports_of(ast.Module(nodes, []), house.package(module)))
        waiting |= ({m for m, _ in inside} | {(*m, name) for m, name in inside}) & house.texts.keys() - loaded
        names = [name for node in nodes for part in ast.walk(node) for name in absolute_names(part)]
        for package in HEAVY:
            if any(f"{name}.".startswith(f"{package}.") for name in names):
                yield f"{dotted(module)} imports {package} when it is imported itself"


RULES = (
    wings_and_doors, own_doors, circles, imports_in_functions, sizes, definitions, unused_names_of_doors, heavy_imports,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert list(rule(HOUSE)) == []


def test_all_wings_have_a_place_in_the_order():
    assert set(WINGS) == HOUSE.wings


FAULTS = [
    (wings_and_doors, "linalg/folding.py", "from ..layers import LowRankLinear", "does not stand before it"),
    (wings_and_doors, "planning/plan.py", "from ..linalg.folding import divisors", "past the door of linalg"),
    (wings_and_doors, "planning/plan.py", "from alds_fast.linalg.folding import divisors", "past the door of linalg"),
    (wings_and_doors, "planning/plan.py", "from ..linalg import no_such_name", "not in the door of linalg"),
    (wings_and_doors, "planning/plan.py", "from .. import __main__", "does not stand before it"),
    (wings_and_doors, "text.py", "from .linalg import divisors", "text is a leaf and imports linalg"),
    (wings_and_doors, "factors/plain.py", "linalg.fold", "uses fold, which is not in the door of linalg"),
    (wings_and_doors, "__init__.py", "from .planning.plan import Plan", "the door imports past the door of planning"),
    (wings_and_doors, "__main__.py", "import alds_fast.planning.plan", "__main__ imports past the door of planning"),
    (wings_and_doors, "linalg/folding.py", "importlib.import_module('alds_fast.layers')", "does not stand before it"),
    (wings_and_doors, "linalg/folding.py", "import_module('..layers', __package__)", "does not stand before it"),
    (wings_and_doors, "planning/plan.py", "import_module('..linalg.folding', __package__)", "past the door of linalg"),
    (
        wings_and_doors,
        "planning/plan.py",
        "import_module(name='.folding', package='alds_fast.linalg')",
        "past the door of linalg",
    ),
    (wings_and_doors, "text.py", "__import__('alds_fast.linalg')", "text is a leaf and imports linalg"),
    (wings_and_doors, "__init__.py", "import_module('.planning.plan', __name__)", "past the door of planning"),
    (circles, "linalg/cpp_core.py", "from .spectra_op import spectra", "a circle"),
    (circles, "linalg/cpp_core.py", "importlib.import_module('.spectra_op', __package__)", "a circle"),
    (imports_in_functions, "text.py", "def f():\n    from .errors import AldsError", "imports a part of the package"),
    (
        imports_in_functions,
        "text.py",
        "async def f():\n    from .errors import AldsError",
        "imports a part of the package",
    ),
    (sizes, "text.py", "#\n" * LONGEST, "lines, at most"),
    (
        definitions,
        "planning/plan.py",
        "if True:\n    async def fold(x): ...",
        "defined in linalg.folding and planning.plan",
    ),
    (definitions, "factors/weighted.py", "SCHEMES = 3", "SCHEMES is defined in factors.weighted and linalg.folding"),
    (own_doors, "linalg/cpp_core.py", "from .. import linalg", "imports linalg through its own door"),
    (own_doors, "linalg/cpp_core.py", "from . import spectra", "imports spectra through its own door"),
    (
        wings_and_doors,
        "planning/plan.py",
        "from .. import linalg as algebra\nalgebra.cpp_core",
        "uses cpp_core",
    ),
    (definitions, "planning/plan.py", "class LowRankLinear: ...", "defined in layers.linear and planning.plan"),
    (unused_names_of_doors, "linalg/__init__.py", "__all__ = ['fold']", "nothing outside uses fold"),
    (heavy_imports, "allocation/pareto.py", "import scipy.linalg", "imports scipy"),
    (heavy_imports, "allocation/pareto.py", "linalg = importlib.import_module('scipy.linalg')", "imports scipy"),
    (heavy_imports, "kernels/backend.py", "try:\n    import triton.knobs\nfinally: ...", "imports triton"),
    (heavy_imports, "text.py", "match 1:\n    case 1:\n        import numba", "imports numba"),
    (heavy_imports, "linalg/folding.py", "from torch import _dynamo", "imports torch._dynamo"),
    (heavy_imports, "kernels/op_linear.py", "from .fused.linear import run", "fused.common imports triton"),
]


@pytest.mark.parametrize("rule, file, line, message", FAULTS)
def test_a_planted_fault_is_noticed(rule, file, line, message):
    house = House(HOUSE.files | {file: f"{HOUSE.files[file]}\n{line}\n"})
    assert any(message in problem for problem in rule(house))


def past_doors(folders):
    """Imports of files outside of the package that are neither leaves nor what a door hands on."""
    for path in (p for folder in folders for p in sorted(folder.rglob("*.py"))):
        for module, name in imports_of(ast.parse(path.read_text())):
            whole = module if name is None else (*module, name)
            known = whole in HOUSE.doors or (module in HOUSE.doors and name in HOUSE.names_of(module))
            kernels = path in COMPILES_KERNELS and whole[:1] == ("kernels",)
            if not known and not kernels and whole[0] not in LEAVES:
                yield f"{path.name} imports {dotted(whole)}, past its door"


def test_examples_and_benchmarks_go_through_doors():
    assert list(past_doors([ROOT / "examples", ROOT / "benchmarks"])) == []


def test_a_benchmark_that_goes_past_a_door_is_noticed(tmp_path):
    good = "import alds_fast, alds_fast.text\nfrom alds_fast import errors, linalg, load\nfrom .linalg import fold\n"
    bad = "from alds_fast.linalg import SCHEMES, fold\nfrom alds_fast.linalg.folding import unfold\n"
    (tmp_path / "bench.py").write_text(good + bad)
    names = "linalg.fold", "linalg.folding.unfold"
    assert list(past_doors([tmp_path])) == [f"bench.py imports {name}, past its door" for name in names]


def unresolved(text, module):
    """References in a module's text to what is neither there, nor in a class of the module, nor by its full name."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for name in re.findall(r":(?:mod|func|class|data|attr|meth|obj):`[~.]*([\w.]+)`", text):
        if not any(_has(holder, name.split(".")) for holder in (module, *classes)) and not _is_there(name):
            yield name


def _has(holder, parts):
    for part in parts:
        if part in getattr(holder, "__dataclass_fields__", ()):
            return True
        if not hasattr(holder, part):
            return False
        holder = getattr(holder, part)
    return True


def _is_there(name):
    """Whether a name is an importable module, or is found in the longest one that its beginning names."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            return _has(importlib.import_module(".".join(parts[:end])), parts[end:])
        except ImportError:
            continue
    return False


@pytest.mark.parametrize("module", sorted(HOUSE.texts), ids=dotted)
def test_cross_references_resolve(module):
    loaded = importlib.import_module(".".join(("alds_fast", *module)))
    assert list(unresolved(HOUSE.texts[module], loaded)) == []


def test_references_that_lead_nowhere_are_noticed():
    good = ":mod:`alds_fast.linalg` :class:`House` :meth:`of_folder` :attr:`~alds_fast.Plan.latency`"
    bad = ":attr:`alds_fast.cells.Task` :func:`no_such_function` :meth:`alds_fast.Plan.nothing`"
    names = ["alds_fast.cells.Task", "no_such_function", "alds_fast.Plan.nothing"]
    assert list(unresolved(good + bad, inspect.getmodule(House))) == names


def test_the_table_of_counts():
    """A package of two wings and a leaf: b.top imports a.low through a's door, a.low imports text."""
    low, top = "from ..text import f\ndef g(): ...", "from ..a import g\nfrom ..a.low import g"
    files = {"__init__.py": "", "text.py": "", "a/__init__.py": "from .low import g", "a/low.py": low}
    house = House(files | {"b/__init__.py": "", "b/top.py": top})
    assert counts(house) == {
        "modules": 3, "of these in the root": 1, "lines": 5, "lines of the longest file": 2, "wings": 2,
        "arrows between modules": 2, "arrows between wings": 1, "floors of modules": 3, "floors of wings": 2,
        "imports past a door": 1, "modules on circles": 0, "wings on circles": 0,
    }  # fmt: skip
    files["text.py"] = "import alds_fast.a.low"
    assert counts(House(files))["modules on circles"] == 2
