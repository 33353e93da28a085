"""Run many ways to compress a model and measure the quality each of them leaves."""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import is_count
from ..criteria import CRITERIA
from ..errors import ArgumentError, EvaluationError, MissingFileError, ModelError
from .cells import Cell, Task, check_cells
from .log import Records
from .run_cell import FAILED
from .table import Evaluation
from .variants import DENSE, Build, product, read_variant
from .workers import Outcome, parallel, serial


def evaluate(
    model: nn.Module | Callable[[int], nn.Module],
    quality: Callable[[nn.Module], float],
    *,
    budgets: Sequence[float] = (0.5, 0.3),
    budget: str = "params",
    variants: Mapping[str, Mapping[str, Any] | Build] | None = None,
    methods: Sequence[str] = ("alds",),
    criteria: Sequence[str | None] = (None,),
    ps: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
    example_inputs: Any = None,
    data: Callable[[int], Any] | None = None,
    after: Callable[[nn.Module, int], nn.Module] | None = None,
    out: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: bool | None = None,
) -> Evaluation:
    """Compress a model in several ways, under several budgets, with several seeds, and measure what is left.

    Args:
        model: a module, or a function of the seed that returns one (networks trained independently, say): the same
            for a seed whenever it is called. It is not changed.
        quality: the module's quality, a finite number, higher is better. It is called in evaluation mode, without
            gradients.
        budgets: shares in (0, 1] of the dense model's parameters, or of its operations with ``budget="flops"``.
        variants: by name, options of :func:`alds_fast.analyze` and :meth:`alds_fast.Analysis.plan`, with
            ``"data": True`` for a variant that is given ``data(seed)`` in the analysis, ``"refit": True`` for one that
            is fitted to it as by ``Plan.apply(refit=)``, ``"refine": True`` or a number of passes for one whose blocks
            are trained to it; or a function (copy of the dense model, share, seed) -> smaller model, which sees to the
            budget itself.
        methods, criteria, ps: in the place of ``variants``, all their combinations; None is plan()'s default. With
            ``data`` they are all given it, and gradients where one of the criteria needs them.
        seeds: integers; torch's random numbers start from the seed in every cell.
        example_inputs: what the model is run with to count operations, as for ``plan(flops=)``.
        data: a function of the seed that returns the batches for the analysis.
        after: a function (compressed model, seed) -> model, retraining for example; the quality is measured before and
            after it.
        out: a folder, made if need be. ``results.jsonl`` gets every cell as soon as it is finished, and a later call
            runs only what is not in there or has failed; ``results.csv``, ``results.json``, ``table.md`` and
            ``quality_params.png``, ``quality_flops.png`` (with matplotlib) are written at the end.
        workers: processes. With more than one, each has one torch thread and makes the analyses of its own cells,
            and everything passed in must be picklable: functions of modules, no lambdas.
        progress: a progress bar on standard error; None for one where that is a terminal.

    Cells are recognised by variant, options, share and seed. Functions go by their names and their own code, not by
    what they call or read: give a new folder if that has changed.

    Returns:
        The cells asked for, by variant, share (the largest first) and seed. A cell whose budget cannot be met has the
        status "cannot be met".

    Raises:
        EvaluationError: cells failed; ``.evaluation`` is the table with what did not. Or a worker died
            (``.evaluation`` is None). What is finished is in the folder in any case.
        ArgumentError, BudgetError: an argument is out of range, or ``out`` holds results of another model or setting.
        ModelError: ``model`` returned something else, or did not run with the example inputs.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> table = evaluate(net, lambda m: -float(m[2].bias.detach().abs().sum()), budgets=[0.5])
    >>> table.best(0.5), table.rows[0]["drop"]
    ('alds', 0.0)
    """
    check_cells(budgets, budget, seeds, example_inputs)
    shares = [float(share) for share in sorted(budgets, reverse=True)]
    if variants is None:
        gradients = any(name in criteria for name, criterion in CRITERIA.items() if criterion.needs_gradients)
        seeing = {} if data is None else {"data": True, "sensitivity": gradients}
        variants = product(methods, criteria, ps, budget, example_inputs, **seeing)
    elif (tuple(methods), tuple(criteria), tuple(ps)) != (("alds",), (None,), (None,)):
        raise ArgumentError("give variants=, or methods=, criteria= and ps=, not both")
    if not isinstance(variants, Mapping) or not variants:
        raise ArgumentError(f"variants={variants!r}: expected a dict of names to options or functions, with an entry")
    read = {name: read_variant(name, options, budget, example_inputs) for name, options in variants.items()}
    _check_functions(model, quality, data, after, workers)
    if data is None and (needy := [name for name, v in read.items() if v.needs_data]):
        raise ArgumentError(
            f"variants[{needy[0]!r}] has data=True, refit=True or refine=: give data=, a function of the seed"
        )
    task = Task(model, quality, read, budget, example_inputs, data, after)
    cells = [Cell(name, share, int(seed)) for seed in seeds for name in read for share in shares]
    folder = None if out is None else _folder(out)
    records = Records(folder)
    records.start(task.setting, list(read))
    failures = _run_all(task, cells, records, workers, progress)
    table = Evaluation.of([r for c in _sort(cells, read) if (r := records.by_key.get(task.key(c)))], records)
    if folder is not None:
        _write(table, folder)
    if failures:
        raise _error(failures, table)
    return table


def _check_functions(model: Any, quality: Any, data: Any, after: Any, workers: Any) -> None:
    if not callable(model):
        raise ModelError(f"model is a {type(model).__name__}; pass a torch.nn.Module or a function of the seed")
    if not isinstance(model, nn.Module):
        with suppress(ValueError):  # a function that does not tell
            try:
                inspect.signature(model).bind(0)
            except TypeError as e:
                raise ModelError(f"model= is called with a seed ({e}): def build(seed), even if it needs none") from e
    for name, function in (("quality", quality), ("data", data), ("after", after)):
        if not callable(function) and not (function is None and name != "quality"):
            raise ArgumentError(f"{name} is a {type(function).__name__}, not a function")
    if not is_count(workers):
        raise ArgumentError(f"workers={workers!r} is not an integer >= 1")


def _folder(out: Any) -> Path:
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise ArgumentError(f"out={out!r}: expected the name of a folder")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"out={os.fspath(out)!r} is not a folder")
    if not folder.absolute().parent.is_dir():
        raise MissingFileError(f"out={os.fspath(out)!r}: its parent folder does not exist; create it first")
    folder.mkdir(exist_ok=True)
    return folder


def _sort(cells: Sequence[Cell], variants: Mapping[str, Any]) -> list[Cell]:
    place = {name: i for i, name in enumerate(variants)}
    return sorted(cells, key=lambda c: (place[c.variant], -c.share, c.seed))


def _jobs(task: Task, cells: Sequence[Cell], records: Records) -> list[tuple[Cell, bool]]:
    """What to do, seed by seed: (cell, whether only its model is to be looked at, as its results are all there)."""

    def is_to_do(cell: Cell) -> bool:
        return records.by_key.get(task.key(cell), {"status": FAILED})["status"] == FAILED

    jobs = []
    for seed in dict.fromkeys(cell.seed for cell in cells):
        dense = Cell(DENSE, 1.0, seed)
        todo = [cell for cell in cells if cell.seed == seed and is_to_do(cell)]
        jobs += [(dense, not is_to_do(dense)), *((cell, False) for cell in todo)]
    return jobs


def _run_all(task: Task, cells: Sequence[Cell], records: Records, workers: int, progress: bool | None) -> list[Outcome]:
    """Run what is not there yet, recording each cell as it is finished; returns the cells that failed.

    A dense model whose quality cannot be had ends it at once.
    """
    jobs = _jobs(task, cells, records)
    outcomes = serial(task, jobs) if workers == 1 else parallel(task, jobs, workers)
    failures: list[Outcome] = []
    with closing(outcomes), _bar(len(jobs), progress) as advance:
        for cell, record, mark, failure in outcomes:
            records.check(cell.seed, mark)
            if record is not None:
                records.add(record)
            if failure is not None:
                failures.append((cell, record, mark, failure))
            if failure is not None and cell.variant == DENSE:
                break
            advance(cell)
    return failures


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[Cell], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    shown = console.is_terminal if progress is None else progress
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task("evaluation", total=total)
        yield lambda c: bar.update(task, advance=1, description=f"{c.variant} {c.share:g} seed {c.seed}")


def _write(table: Evaluation, folder: Path) -> None:
    table.save(folder)
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn("no pictures: matplotlib is not installed (pip install 'alds_fast[plot]')", stacklevel=3)
        return
    for x in ("params", "flops"):
        if any(row["quality"] is not None and row[x] is not None for row in table.rows):
            table.plot(folder / f"quality_{x}.png", x)


def _error(failures: Sequence[Outcome], table: Evaluation) -> EvaluationError:
    cell, record, _, cause = failures[0]
    message = record["message"] if record else ""
    first = f"{cell.variant!r}, share {cell.share:g}, seed {cell.seed}: {message}"
    error = EvaluationError(f"{len(failures)} cell{'s' * (len(failures) > 1)} failed, the first is {first}")
    error.evaluation = table
    error.__cause__ = cause
    return error
