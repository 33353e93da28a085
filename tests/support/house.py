"""The modules of the package and what they import from each other, read from the source. As a script it prints counts.

Usage: python tests/support/house.py [GIT_REVISION]. Without a revision it reads the files of the working tree.
"""

import ast
import functools
import io
import subprocess
import sys
import tarfile
from importlib.util import resolve_name
from pathlib import Path

NAME = "alds_fast"
IMPORTING_CALLS = ("import_module", "__import__")
ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def parsed(text):
    return ast.parse(text)


def absolute(dotted, anchor):
    """The parts of a dotted name; leading dots start at the anchor, a package's name, and give () without one."""
    if dotted.startswith(".") and anchor is None:
        return ()
    return tuple(resolve_name(dotted, anchor).split("."))


def imported_by_call(node, anchor=None):
    """The parts of the module that ``import_module("a literal")`` or ``__import__`` loads; () for any other node."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in IMPORTING_CALLS:
        given = dict(zip(("name", "package"), node.args, strict=False)) | {k.arg: k.value for k in node.keywords}
        name, package = (getattr(given.get(word), "value", None) for word in ("name", "package"))
        if isinstance(name, str):
            return absolute(name, package if isinstance(package, str) else anchor)
    return ()


def imports_of(tree, package=None):
    """(module, name) of every first-party import in a tree: a module is the parts of its dotted name, () the root.

    A file of the package says in which folder it lies. The name is None where a module itself is imported, as by
    ``import_module`` of a literal. A name that is put together when the code runs is not seen.
    """
    anchor = None if package is None else ".".join((NAME, *package))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = (alias.name.split(".") for alias in node.names)
            yield from ((tuple(inside), None) for first, *inside in dotted if first == NAME)
        elif isinstance(node, ast.ImportFrom):
            first, *inside = absolute("." * node.level + (node.module or ""), anchor) or (None,)
            if first == NAME:
                yield from ((tuple(inside), alias.name) for alias in node.names)
        elif (module := imported_by_call(node, anchor))[:1] == (NAME,):
            yield module[1:], None


@functools.cache
def _imports(text, package):
    return tuple(imports_of(parsed(text), package))


def floors(below):
    """Sets of nodes, each on top of what it imports, lowest first; and the nodes on circles, which have no floor."""
    rest, levels = dict(below), []
    while level := {a for a, others in rest.items() if not others & rest.keys()}:
        levels.append(level)
        rest = {a: others for a, others in rest.items() if a not in level}
    while top := rest.keys() - set().union(*rest.values()):
        rest = {a: others for a, others in rest.items() if a not in top}
    return levels, set(rest)


class House:
    """A package of texts by file name. Modules are tuples, the parts of their dotted names; () is the root.

    The door of a folder is its ``__init__``. A wing is a folder with a door right below the root.
    """

    def __init__(self, files):
        self.files, self.texts, self.doors = files, {}, set()
        for file, text in files.items():
            *module, last = file.removesuffix(".py").split("/")
            if last == "__init__":
                self.doors.add(tuple(module))
            else:
                module.append(last)
            self.texts[tuple(module)] = text
        self.wings = {door[0] for door in self.doors if len(door) == 1}

    @classmethod
    def of_folder(cls, folder):
        return cls({p.relative_to(folder).as_posix(): p.read_text() for p in sorted(Path(folder).rglob("*.py"))})

    @classmethod
    def of_revision(cls, revision):
        command = ["git", "-C", ROOT, "archive", revision, NAME]
        packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            names = [n for n in archive.getnames() if n.endswith(".py")]
            return cls({n.removeprefix(f"{NAME}/"): archive.extractfile(n).read().decode() for n in names})

    def tree(self, module):
        return parsed(self.texts[module])

    def package(self, module):
        return module if module in self.doors else module[:-1]

    def imports(self, module):
        return _imports(self.texts[module], self.package(module))

    def names_of(self, door):
        """``__all__`` of a door, read and not run."""
        names = []
        for node in self.tree(door).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                names = ast.literal_eval(node.value)
        return names

    def source(self, module, name):
        """The module that an imported name comes from: the name may be a module, and doors hand names on."""
        if name is None or (*module, name) in self.texts:
            return module if name is None else (*module, name)
        if module in self.doors:
            for inner, handed_on in self.imports(module):
                if handed_on == name and inner != module:
                    return self.source(inner, name)
        return module

    def arrows(self):
        """Of every module but doors, the modules that it imports from."""
        return {
            module: {self.source(*imported) for imported in self.imports(module)} - {module} - self.doors
            for module in self.texts.keys() - self.doors
        }

    def between_wings(self):
        """(module, imported module, name) of all imports from one wing into another."""
        for module in sorted(self.texts):
            for imported, name in self.imports(module):
                whole = imported or (name,)
                if module and module[0] in self.wings and whole[0] in self.wings - {module[0]}:
                    yield module, whole, name if imported else None


def counts(house):
    """What a house comes to, by words."""
    arrows, crossing = house.arrows(), list(house.between_wings())
    levels, circle = floors(arrows)
    pairs = {(module[0], imported[0]) for module, imported, _ in crossing}
    wing_levels, wing_circle = floors({wing: {b for a, b in pairs if a == wing} for wing in house.wings})
    lines = [len(text.splitlines()) for text in house.texts.values()]
    return {
        "modules": len(arrows),
        "of these in the root": sum(len(module) == 1 for module in arrows),
        "lines": sum(lines),
        "lines of the longest file": max(lines),
        "wings": len(house.wings),
        "arrows between modules": sum(map(len, arrows.values())),
        "arrows between wings": len(pairs),
        "floors of modules": len(levels),
        "floors of wings": len(wing_levels),
        "imports past a door": sum(len(imported) > 1 for _, imported, _ in crossing),
        "modules on circles": len(circle),
        "wings on circles": len(wing_circle),
    }


def main(revision=None):
    house = House.of_revision(revision) if revision else House.of_folder(ROOT / NAME)
    for word, number in counts(house).items():
        print(f"{word:26}{number:>8,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
