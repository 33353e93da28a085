"""A model and what was made of it side by side: size, operations, latency and quality, in one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import check_model, is_count
from ..deployment import whole_model_ms
from ..errors import ArgumentError, ModelError
from ..files import replacing
from ..layers import count_bytes, count_params
from ..measurement import (
    STEADY,
    count_inputs,
    device_of,
    environment,
    keeping_state,
    median_ratio,
    paired_ratios,
)
from ..planning import check_plot, measured_quality
from ..text import ShownInNotebooks, table
from .plot import COLOURS
from .saving import Saved
from .variants import DENSE

FORMAT = "alds_fast.report"
VERSION = 1
QUALITY = "quality"
_WORDS = {"params": "parameters", "megabytes": "MB", "flops": "FLOPs", "ms": "ms"}


@dataclass(frozen=True)
class Report(Saved, ShownInNotebooks):
    """What models cost and are worth; made by :func:`alds_fast.report`.

    Attributes:
        values: by model, "dense" first: "params", shared ones once; "megabytes", 10^6 bytes of parameters and buffers;
            "flops" of one run; "ms" of one run, the median over the rounds; "quality" where it was measured.
        ratios: by model but the first: the share of the dense model's value that is left. Of "ms" the median of the
            ratios of runs side by side, which drift of the machine does not move. "quality" is none of them.
        spreads: by model but the first, the quartiles of its ratios of "ms".
        conditions: what "ms" holds for: hardware, torch's version, threads and settings, rounds.
    """

    values: dict[str, dict[str, float]]
    ratios: dict[str, dict[str, float]]
    spreads: dict[str, tuple[float, float]]
    conditions: dict[str, Any]

    @property
    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows."""
        headers = ["", DENSE]
        for name in self.ratios:
            headers += [name, f"/ {DENSE}"]
        rows = []
        for key, before in self.values[DENSE].items():
            row = [_WORDS.get(key, key), _text(key, before)]
            for name in self.ratios:
                value = self.values[name][key]
                ratio = f"{self.ratios[name][key]:.3f}" if key in self.ratios[name] else "-"
                row += [_text(key, value), f"{value - before:+.4g}" if key == QUALITY else ratio]
            rows.append(row)
        return headers, rows

    @property
    def _remarks(self) -> str:
        c = self.conditions
        threads = f", threads {c['threads']}" if c["threads"] else ""
        where = f"{c['device']}{threads}, torch {c['torch']}, {c['rounds']} rounds in turns"
        halves = [f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in self.spreads.items()]
        noisy = [n for n, (low, high) in self.spreads.items() if high - low > STEADY * self.ratios[n]["ms"]]
        busy = "; rounds were far apart: measure again on a quiet machine" if noisy else ""
        return f"{where}; quartiles of the ratios of ms: {', '.join(halves)}{busy}"

    def __repr__(self) -> str:
        return f"<Report of {', '.join(self.values)}; print() has the table>"

    def __str__(self) -> str:
        return f"{table(*self._cells)}\n{self._remarks}"

    def to_markdown(self) -> str:
        """The table in Markdown, and what it holds for."""
        headers, rows = self._cells
        lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
        return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", self._remarks, ""])

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    def _draw(self, path: Path) -> None:
        check_plot(path)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        keys = list(next(iter(self.ratios.values())))
        figure = Figure(figsize=(6.4, 1.2 + 0.5 * len(keys) * (0.4 + 0.6 * len(self.ratios))), layout="constrained")
        FigureCanvasAgg(figure)
        axes, height = figure.subplots(), 0.8 / len(self.ratios)
        for number, (name, ratios) in enumerate(self.ratios.items()):
            places = [i + number * height for i in range(len(keys))]
            bars = axes.barh(places, [100 * ratios[key] for key in keys], height * 0.9, color=COLOURS[number % 7])
            axes.bar_label(bars, [_text(key, self.values[name][key]) for key in keys], padding=3, fontsize=9)
            quality = self.values[name].get(QUALITY)
            bars.set_label(name + ("" if quality is None else f", quality {_text(QUALITY, quality)}"))
        axes.axvline(100, color="0.35", linestyle="--", linewidth=1.3, label=self._dense_label)
        axes.set_yticks([i + (len(self.ratios) - 1) * height / 2 for i in range(len(keys))], [_WORDS[k] for k in keys])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(100.0, *(100 * r for ratios in self.ratios.values() for r in ratios.values())))
        axes.set_xlabel("% of the dense model")
        figure.legend(loc="outside lower center", fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=130)

    @property
    def _dense_label(self) -> str:
        quality = self.values[DENSE].get(QUALITY)
        return DENSE + ("" if quality is None else f", quality {_text(QUALITY, quality)}")


def _text(key: str, value: float) -> str:
    return f"{value:,}" if key in ("params", "flops") else f"{value:.4g}"


def report(
    dense: nn.Module,
    small: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    rounds: int = 9,
) -> Report:
    """Parameters, bytes, operations, latency and quality of a model before and after, measured on its device.

    The models take turns of runs in evaluation mode, as many as last 2 ms; they are left as they were, as are all
    random numbers.

    Args:
        dense: the model before.
        small: the model after; or several by name, a compressed and a deployed one say.
        example_inputs: what one run is given: a tensor, a tuple or list of positional arguments or a dict of keyword
            arguments, on the models' device.
        evaluate: what a model in evaluation mode is worth, a finite number, higher is better; called once a model.
        rounds: turns that every model takes, up to three times as many where these are far apart.

    Raises:
        ArgumentError: an argument is out of range, or ``evaluate`` returned no finite number. ModelError: a model is no
        module, does not run with the example inputs, or lies on another device than the dense one.

    >>> import torch, alds_fast as alds
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> seen = alds.report(model, alds.compress(model, params=0.5), torch.randn(8, 64), rounds=3)
    >>> seen.ratios["compressed"]["params"] <= 0.5, sorted(seen.values["dense"])
    (True, ['flops', 'megabytes', 'ms', 'params'])
    """
    models = _models(dense, small)
    if not is_count(rounds, 2):
        raise ArgumentError(f"rounds={rounds!r} is not an integer >= 2")
    values: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        flops = count_inputs(model, example_inputs, ())[1]
        values[name] = {"params": count_params(model), "megabytes": count_bytes(model) / 1e6, "flops": flops}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(keeping_state(model))
        times = whole_model_ms(models, example_inputs, rounds)
    ratios: dict[str, dict[str, float]] = {}
    spreads: dict[str, tuple[float, float]] = {}
    for name in models:
        values[name]["ms"] = statistics.median(times[name])
        if name != DENSE:
            shares = {k: values[name][k] / v for k, v in values[DENSE].items() if k != "ms" and v}
            ratios[name] = {**shares, "ms": median_ratio(times, name, DENSE)}
            low, _, high = statistics.quantiles(paired_ratios(times, name, DENSE), n=4, method="inclusive")
            spreads[name] = low, high
    if evaluate is not None:
        for name, model in models.items():
            values[name][QUALITY] = measured_quality(evaluate, model)
    return Report(values, ratios, spreads, {**environment(device_of(dense)), "rounds": len(times[DENSE])})


def _models(dense: nn.Module, small: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """By name, the dense one first; refused where they cannot be compared."""
    others = dict(small) if isinstance(small, Mapping) else {"compressed": small}
    if not others or DENSE in others or not all(isinstance(name, str) for name in others):
        raise ArgumentError(f"small={list(others)}: expected a model, or models by names other than {DENSE!r}")
    models = {DENSE: dense, **others}
    for name, model in models.items():
        check_model(model)
        if device_of(model) != device_of(dense):
            raise ModelError(f"the model {name!r} is on {device_of(model)}, the dense one on {device_of(dense)}")
    return models
