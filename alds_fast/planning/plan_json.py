"""Plans as JSON text: written exactly, read with every row checked."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..criteria import CRITERIA
from ..errors import AldsError, ArgumentError, PlanError
from ..factors import FewerUnits, read_spans, spans_text
from ..text import number
from .options import read_pins
from .plan_rows import Latency, LayerPlan, Quality

FORMAT = "alds_fast.plan"
VERSION = 1
_LATER = {"held_out", "criterion", "remark", "pivots", "stored"}  # fields that older plans do not have
_FIELDS = {field.name for field in dataclasses.fields(LayerPlan)} - _LATER | {"error_is_of"}
_BUDGET = re.compile(
    r"(error|quality)=[^=, ]+|(params|flops|memory|latency)=[^=, ]+(, (flops|memory|latency)=[^=, ]+)*"
)


def plan_text(plan: Mapping[str, Any]) -> str:
    """JSON text of a plan's fields."""
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    head |= {name: plan[name] for name in ("budget", "criterion", "method")} | {"p": number(plan["p"])}
    head |= {"align": plan["align"], "gap": number(plan["gap"])}
    rows = [
        {**vars(row), "error": number(row.error), "held_out": number(row.held_out)}
        | {"error_is_of": _choice_fields(vars(row))} for row in plan["layers"]
    ]  # fmt: skip
    head |= {
        "bias_correction": plan["bias_correction"],
        "keeps_constants": plan["keeps_constants"],
        "params_before": plan["params_before"],
        "latency": vars(plan["latency"]) if plan["latency"] else None,
        "pins": plan["pins"],
        "min_rank": plan["min_rank"],
        "costs": plan["costs"],
        "hidden_units": [{**vars(units), "kept": spans_text(units.kept)} for units in plan["hidden_units"]],
        "quality": vars(plan["quality"]) if plan["quality"] else None,
    }
    return json.dumps({**head, "layers": rows}, indent=1)


def read_plan(text: str) -> dict[str, Any]:
    """The fields of a plan; PlanError, which names the row and the field, for what is none."""
    try:
        return _read(json.loads(text))
    except AldsError:
        raise
    except KeyError as e:
        raise PlanError(f"not a plan: the field {e} is missing") from e
    except (TypeError, ValueError, AttributeError, RecursionError) as e:
        raise PlanError(f"not a plan: {e}") from e


def _read(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data["format"] != FORMAT:
        raise PlanError(f"not a plan: its format is {data['format']!r}, expected {FORMAT!r}")
    if data["version"] > VERSION:
        raise PlanError(f"plan version {data['version']} is newer than {VERSION}; update alds_fast")
    if not isinstance(data["layers"], list):
        raise PlanError("not a plan: layers is not a list")
    layers = tuple(_read_row(fields) for fields in data["layers"])
    budget, criterion, method = (_read_field(data, "plan", n, str) for n in ("budget", "criterion", "method"))
    if not _BUDGET.fullmatch(budget):
        raise PlanError(f"plan: budget={budget!r} is not like 'params=0.5, flops=0.3' or 'error=0.1'")
    if criterion not in CRITERIA:
        raise PlanError(f"plan: criterion={criterion!r} is not one of {', '.join(CRITERIA)}; update alds_fast")
    fields: dict[str, Any] = {"budget": budget, "criterion": criterion, "method": method}
    fields |= {n: _read_field(data, "plan", n, int) for n in ("params_before", "align")}
    fields |= {n: _read_number(data, "plan", n) for n in ("p", "gap")}
    if any(math.isnan(row.error) for row in layers):
        fields["gap"] = math.nan
    fields["latency"] = None if _is_edited(data["layers"]) else _read_latency(data.get("latency"))
    for name in ("bias_correction", "keeps_constants"):  # older plans do not have these
        fields[name] = data.get(name, False)
        if not isinstance(fields[name], bool):
            raise PlanError(f"plan: {name}={fields[name]!r} is not true or false")
    try:
        fields["pins"] = read_pins(data.get("pins"))
    except ArgumentError as e:
        raise PlanError(f"plan: {e}") from e
    fields["min_rank"] = _read_field({"min_rank": 1, **data}, "plan", "min_rank", int)
    fields["costs"] = {} if _is_edited(data["layers"]) else _read_costs(data.get("costs", {}))
    fields["quality"] = None if _is_edited(data["layers"]) else _read_quality(data.get("quality"))
    units = data.get("hidden_units", [])
    fewer = tuple(_read_units(of) for of in units) if isinstance(units, list) else (_read_units(units),)
    inside = {name for of in fewer for name in of.layers}
    return {**fields, "hidden_units": fewer, "layers": tuple(_with_fewer(r) if r.name in inside else r for r in layers)}


def _with_fewer(row: LayerPlan) -> LayerPlan:
    """The row of a layer that lost hidden units: one that stays dense is what is left."""
    if row.stored is None or len(row.shape) != 2:
        raise PlanError(f"layer {row.name!r}: it lost hidden units, and its row does not say what of; plan again")
    if row.choice is not None:
        return row
    return dataclasses.replace(row, params_after=row.params_before - row.stored + math.prod(row.shape))


def _read_units(fields: Any) -> FewerUnits:
    """What is left of a group of hidden units, from its JSON fields."""
    wanted = {field.name for field in dataclasses.fields(FewerUnits)}
    if not isinstance(fields, dict) or set(fields) != wanted or not isinstance(fields["producers"], list):
        raise PlanError(f"not a plan: hidden_units has {str(fields)[:80]}, expected the fields {sorted(wanted)}")
    consumer = _read_field(fields, "hidden_units", "consumer", str)
    where = f"hidden_units of {consumer!r}"
    count = _read_field(fields, where, "count", int)
    if not fields["producers"] or not all(isinstance(name, str) for name in fields["producers"]):
        raise PlanError(f"{where}: producers={fields['producers']!r} is not a list of names")
    kept = read_spans(_read_field(fields, where, "kept", str), where)
    if not kept or kept[-1] >= count:
        raise PlanError(f"{where}: kept={fields['kept']!r} are not one or more of {count} units, from 0 on")
    return FewerUnits(tuple(fields["producers"]), consumer, count, kept, _read_number(fields, where, "error"))


def _read_quality(fields: Any) -> Quality | None:
    """What was measured of a plan's quality, from its JSON fields, None for null."""
    if fields is None:
        return None
    try:
        steps = tuple((float(keep), float(quality)) for keep, quality in fields["steps"])
        return Quality(**{**fields, **{n: float(fields[n]) for n in ("asked", "measured", "dense")}, "steps": steps})
    except (KeyError, TypeError, ValueError) as e:
        raise PlanError(f"not a plan: quality={fields!r} does not have the fields of a measured quality") from e


def _read_costs(costs: Any) -> dict[str, tuple[int, int]]:
    """What a model costs before and after, by name."""
    pairs: dict[str, Any] = costs if isinstance(costs, dict) else {"": costs}
    for name, pair in pairs.items():
        counts = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        if name not in ("flops", "memory", "activations") or not counts:
            raise PlanError(
                f"not a plan: costs={costs!r} are not two integers >= 0 each of flops, memory and activations"
            )
    return {name: (pair[0], pair[1]) for name, pair in pairs.items()}


def _read_latency(fields: Any) -> Latency | None:
    """A plan's latency from its JSON fields, None for null."""
    if fields is None:
        return None
    names = {field.name for field in dataclasses.fields(Latency)}
    if not isinstance(fields, dict) or set(fields) | {"spread"} != names:
        raise PlanError(f"not a plan: latency={fields!r} does not have the fields of a measured latency")
    shares = {n: _read_number(fields, "latency", n) for n in ("asked", "measured", "dense_ms", "compressed_ms")}
    if not all(0 < value < math.inf for value in shares.values()):
        raise PlanError(f"not a plan: latency={fields!r} has shares or times that are not above 0")
    device, refinements = (
        _read_field(fields, "latency", "device", str),
        _read_field(fields, "latency", "refinements", int),
    )
    spread = None if fields.get("spread") is None else _read_number(fields, "latency", "spread")
    return Latency(**shares, device=device, refinements=refinements, spread=spread)


def _read_field(fields: dict[str, Any], where: str, name: str, kind: type) -> Any:
    """A field of that type; integers must not be negative."""
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise PlanError(f"{where}: {name}={value!r} is not {'a text' if kind is str else 'an integer >= 0'}")
    return value


def _read_number(fields: dict[str, Any], where: str, name: str) -> float:
    """A number >= 0; null is NaN, "inf" infinity."""
    value = fields[name]
    if value is None or value == "inf":
        return math.nan if value is None else math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise PlanError(f"{where}: {name}={value!r} is not a number >= 0, null or 'inf'")
    return float(value)


def _read_row(fields: dict[str, Any]) -> LayerPlan:
    """A row from its JSON fields; where the choice was edited, the parameters are counted anew and the error is NaN."""
    if not isinstance(fields, dict) or set(fields) - _LATER != _FIELDS:
        raise PlanError(f"not a plan: a layer has the fields {sorted(fields)}, expected {sorted(_FIELDS)}")
    where = f"layer {_read_field(fields, 'a layer', 'name', str)!r}"
    shape, triple = fields["shape"], [fields[name] for name in ("scheme", "groups", "rank")]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise PlanError(f"{where}: shape={shape!r} is not a list of integers >= 0")
    if any(v is None for v in triple) != all(v is None for v in triple):
        raise PlanError(f"{where}: scheme, groups and rank must be all null or all integers, got {triple}")
    for name in ("reason", "remark"):
        if fields.get(name) is not None:
            _read_field(fields, where, name, str)
    if fields.get("stored") is not None:
        _read_field(fields, where, "stored", int)
    if fields.get("pivots", "") not in ("", "output", "input"):
        raise PlanError(f"{where}: pivots={fields['pivots']!r} is neither 'output' nor 'input', nor ''")
    counts = {n: _read_field(fields, where, n, int) for n in ("conv_groups", "params_before", "params_after")}
    held_out = None if fields.get("held_out") is None else _read_number(fields, where, "held_out")
    if fields.get("criterion") not in (None, *CRITERIA):
        raise PlanError(f"{where}: criterion={fields['criterion']!r} is not one of {', '.join(CRITERIA)}")
    known: dict[str, Any] = {
        "held_out": held_out,
        "kind": _read_field(fields, where, "kind", str),
        "error": _read_number(fields, where, "error"),
        **counts,
    }
    known |= {n: v for n, v in fields.items() if n != "error_is_of" and n not in known}
    row = LayerPlan(**{**known, "shape": tuple(shape)})
    if row.rank is not None:
        _check_choice(row, where)
    if _choice_fields(fields) == fields["error_is_of"]:
        return row
    choice = row.choice
    stored = row.stored or (choice.shape.numel if choice else 0)
    after = row.params_before - (stored - choice.decomposition.params(choice.shape) if choice else 0)
    reason = None if choice else "kept dense by hand"
    changed = {"params_after": after, "error": math.nan if choice else 0.0, "reason": reason, "held_out": None}
    return LayerPlan(**{**vars(row), **changed})


def _check_choice(row: LayerPlan, where: str) -> None:
    if any(type(v) is not int for v in (row.scheme, row.groups, row.rank)):
        raise PlanError(f"{where}: scheme, groups and rank must be integers")
    if len(row.shape) < 2 or 0 in row.shape or row.conv_groups < 1 or row.shape[0] % row.conv_groups:
        raise PlanError(f"{where}: shape={row.shape} with conv_groups={row.conv_groups} is not that of a layer")
    choice = row.choice
    assert choice is not None
    try:
        choice.decomposition.check(choice.shape)
    except ArgumentError as e:
        raise PlanError(f"{where}: {e}") from e


def _is_edited(rows: list[dict[str, Any]]) -> bool:
    """Whether a row of a plan in JSON was edited by hand."""
    return any(_choice_fields(row) != row["error_is_of"] for row in rows)


def _choice_fields(row: Mapping[str, Any]) -> list[Any]:
    """Scheme, groups and rank; pivots where there are any, which older plans do not know."""
    return [row["scheme"], row["groups"], row["rank"], *([row["pivots"]] if row.get("pivots") else [])]
