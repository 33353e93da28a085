"""README and docs: snippets run and print what stands there, commands parse, links lead somewhere, figures are new.

A page's ``python`` blocks share one namespace; an ``output`` block is what the block before it prints. A block that
cannot run here has ``<!-- not run: reason -->`` in front of it.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.marks import slow

import alds_fast as alds
from alds_fast import kernels
from alds_fast.cli import main

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = 1  # snippets with a reason why they cannot run here
MOST_LINES = 130  # of the README
FENCE = re.compile(r"(?:^<!-- not run: *(.*?) *-->\n)?^```(\S*)\n(.*?)^```$", re.M | re.S)
KINDS = {"python", "output", "console", "text"}
MODULES = {"torch", "transformers", "peft", "alds_fast", *sys.stdlib_module_names}
HISTORY = re.compile(r"\b(no longer|any ?more|formerly|previously|nowadays|now)\b", re.I)


class Block(NamedTuple):
    kind: str
    text: str
    line: int
    not_run: str | None


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [Block(m[2], m[3], text.count("\n", 0, m.start(3)) + 1, m[1]) for m in FENCE.finditer(text)]


def prose(page):
    """The page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@every_page
def test_kinds_of_blocks(page):
    sequence = blocks(page)
    assert page.read_text().count("```") == 2 * len(sequence) and {b.kind for b in sequence} <= KINDS
    for before, block in zip([None, *sequence], sequence, strict=False):
        if block.kind == "output":
            assert before is not None and before.kind == "python" and before.not_run is None, f"line {block.line}"


def test_snippets_that_are_not_run_say_why():
    reasons = [b.not_run for page in PAGES for b in blocks(page) if b.not_run is not None]
    assert len(reasons) == NOT_RUN and all(len(reason.split()) >= 3 for reason in reasons)
    assert sum(page.read_text().count("<!-- not run") for page in PAGES) == NOT_RUN  # each in front of a block


@contextlib.contextmanager
def as_for_a_user(monkeypatch, folder):
    """In an empty folder, without Triton's interpreter, which the tests of the kernels switch on."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALDS_FAST_CACHE", str(folder / "cache"))
    if importlib.util.find_spec("triton"):
        import triton

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with torch.random.fork_rng([]):
        yield


WITH_CODE = [page for page in PAGES if any(b.kind == "python" for b in blocks(page))]


@pytest.mark.parametrize("page", [slow(p) if p.stem == "README" else p for p in WITH_CODE], ids=name)
def test_snippets_run(page, monkeypatch, tmp_path):
    namespace, sequence = {"__name__": "snippet"}, blocks(page)
    with as_for_a_user(monkeypatch, tmp_path):
        for block, after in zip(sequence, [*sequence[1:], None], strict=True):
            if block.kind != "python" or block.not_run is not None:
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                code = "\n" * (block.line - 1) + block.text  # so that tracebacks name the page's lines
                exec(compile(code, str(page), "exec"), namespace)
            if after is not None and after.kind == "output":
                assert printed.getvalue() == after.text, f"{name(page)}, line {block.line}"


@every_page
def test_snippets_use_public_names(page):
    for block in blocks(page):
        for node in ast.walk(ast.parse(block.text)) if block.kind == "python" else ():
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
                assert all(n.split(".")[0] in MODULES for n in names), f"line {block.line}"
                assert not any(n.startswith("alds_fast.") for n in names), f"line {block.line}"
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "alds_fast":
                public = {"alds_fast": alds.__all__, "alds_fast.kernels": kernels.__all__}
                public = (public | {"alds_fast.bench": ["register"]})[node.module]
                assert {a.name for a in node.names} <= set(public), f"line {block.line}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "alds":
                assert node.attr in alds.__all__, f"line {block.line}: alds.{node.attr}"


COMMANDS = [
    pytest.param(line, id=f"{name(page)}:{line[:60]}")
    for page in PAGES
    for block in blocks(page)
    if block.kind == "console"
    for line in block.text.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    program, *words = shlex.split(command)
    if program == "torchrun":
        program, words = "alds-fast", words[words.index("alds_fast") + 1 :]
    if program == "alds-fast":
        _parse(words, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets)
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        asked = [extra for word in words for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")]
        assert words[0] == "install" and set(asked) <= set(extras)
    else:
        assert program in ("python", "bash"), command
        script = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
        source = (ROOT / script).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))


def _parse(words, monkeypatch):
    """The command line up to where the work would begin."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *args):
        result = parse(self, *args)
        result.run = lambda args: None
        return result

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    assert main(words) == 0


def anchors(page):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@every_page
def test_links_lead_somewhere(page):
    assert len(set(anchors(page))) == len(anchors(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert "://" in link or (target.exists() and target.is_relative_to(ROOT)), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_that_are_named_exist(page):
    for path in re.findall(r"(?<![\w/.])((?:benchmarks|docs|examples|tests)/[\w/]+\.\w+)", page.read_text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "measurements.md"], ids=name)
def test_no_history(page):
    assert not HISTORY.findall(prose(page))


def _script():
    spec = importlib.util.spec_from_file_location("make_measurements", ROOT / "docs" / "make_measurements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_results():
    script, remedy = _script(), "run python docs/make_measurements.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.measurements(), remedy
    assert script.README.read_text(encoding="utf-8") == script.readme(), remedy
    assert script.figures() in script.README.read_text(encoding="utf-8")


def tree(text):
    """From wing to the names of its files, as docs/code.md draws them."""
    files, folders = {}, []
    for line in text.splitlines():
        head = re.match(r"( +)(\w+)/ +(.*)", line)
        if head:
            folders = [*folders[: len(head[1]) // 2 - 1], head[2]]
            files["/".join(folders)] = set(head[3].split())
        elif line.startswith(" " * 20):
            files["/".join(folders)] |= set(line.split())
    return files


def test_the_tree_is_drawn_as_it_is():
    drawn, package = tree(blocks(ROOT / "docs" / "code.md")[0].text), ROOT / "alds_fast"
    assert len([wing for wing in drawn if "/" not in wing]) == 17
    there = {p.parent.relative_to(package).as_posix() for p in package.glob("*/**/*.py")}
    assert set(drawn) == there
    for wing, names in drawn.items():
        assert names == {p.stem for p in (package / wing).glob("*.py")} - {"__init__", "__main__"}, wing
