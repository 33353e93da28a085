"""One direction of imports: every module imports first-party code only from modules before it, at its top."""

import ast
from pathlib import Path

import alds_fast

PACKAGE = Path(alds_fast.__file__).parent
ORDER = (
    *("version", "errors", "text", "tied", "folding", "native", "linalg_torch", "linalg", "bounds"),
    *("kernels.reference", "kernels.checks", "kernels.tiles", "kernels.rows", "kernels.linear", "kernels.conv2d"),
    *("kernels.ops", "kernels.choose", "kernels.dispatch", "kernels.__init__", "layers", "convolution"),
    *(
        "replace",
        "discover",
        "options",
        "input_spec",
        "measure",
        "flops",
        "spectra",
        "shards",
        "shard_file",
        "merged",
        "renaming",
        "huggingface",
        "pretrained",
        "patches",
        "sums",
        "collector",
        "moments",
        "weighted",
        "weighted_factors",
        "allocate",
        "budgets",
        "candidates",
        "doubt",
    ),
    *("heuristic", "pca", "baselines", "data_criteria", "pruning"),
    *(
        "costs",
        "factorize",
        "norms",
        "reaching",
        "refit",
        "rows",
        "timings",
        "latency",
        "refine",
        "plan",
        "planned",
        "analysis",
        "compression",
    ),
    *(
        "container",
        "pruned",
        "world",
        "journal",
        "inputs",
        "layout",
        "skeleton",
        "workload",
        "streamed_plan",
        "streaming",
        "directory",
    ),
    *(
        "variants",
        "race",
        "deploy_table",
        "deployment",
        "checkpoint",
        "retrain_options",
        "training",
        "run_state",
        "pipeline",
        "retraining",
        "report",
        "cells",
        "runner",
        "pool",
        "records",
        "quality_plot",
        "results",
        "evaluation",
        "targets",
        "cli_directory",
        "cli_eval",
        "cli",
        "__init__",
        "__main__",
    ),
)


def _first_party(node, package=""):
    """Modules of the package that an import statement of a module in ``package`` names."""
    if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("alds_fast")):
        module = (node.module or "").removeprefix("alds_fast").lstrip(".")
        inside = package if node.level == 1 else ""
        names = [module] if module else [alias.name for alias in node.names]
        return [f"{inside}{name}" for name in names]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.startswith("alds_fast")]
    return []


def _paths():
    """Files of the package by dotted name."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def _trees():
    return {name: ast.parse(path.read_text()) for name, path in _paths().items()}


def test_every_module_has_its_place():
    assert set(_trees()) == set(ORDER)


def test_imports_go_one_way():
    for name, tree in _trees().items():
        for node in ast.walk(tree):
            for module in _first_party(node, name[: name.rfind(".") + 1]):
                assert module == "_core" or ORDER.index(module) < ORDER.index(name), f"{name} imports {module}"


def test_no_first_party_import_inside_a_function():
    for name, tree in _trees().items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                assert not [n for n in ast.walk(function) if _first_party(n)], f"{name}.{function.name}"


def test_modules_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 260, path.name
