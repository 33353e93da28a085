"""Plans as JSON text: written exactly, read with every row checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..criteria import CRITERIA
from ..errors import AldsError, PlanError
from ..text import number
from .plan_rows import choice_fields, is_edited, read_field, read_latency, read_number, read_row

FORMAT = "alds_fast.plan"
VERSION = 1
_BUDGET = re.compile(r"error=[^=, ]+|(params|flops|latency)=[^=, ]+(, (flops|latency)=[^=, ]+)*")


def plan_text(plan: Mapping[str, Any]) -> str:
    """JSON text of a plan's fields."""
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    head |= {name: plan[name] for name in ("budget", "criterion", "method")} | {"p": number(plan["p"])}
    head |= {"align": plan["align"], "gap": number(plan["gap"])}
    rows = [
        {**vars(row), "error": number(row.error), "held_out": number(row.held_out)}
        | {"error_is_of": choice_fields(vars(row))} for row in plan["layers"]
    ]  # fmt: skip
    head |= {
        "bias_correction": plan["bias_correction"],
        "params_before": plan["params_before"],
        "latency": vars(plan["latency"]) if plan["latency"] else None,
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
    layers = tuple(read_row(fields) for fields in data["layers"])
    budget, criterion, method = (read_field(data, "plan", n, str) for n in ("budget", "criterion", "method"))
    if not _BUDGET.fullmatch(budget):
        raise PlanError(f"plan: budget={budget!r} is not like 'params=0.5, flops=0.3' or 'error=0.1'")
    if criterion not in CRITERIA:
        raise PlanError(f"plan: criterion={criterion!r} is not one of {', '.join(CRITERIA)}; update alds_fast")
    fields: dict[str, Any] = {"budget": budget, "criterion": criterion, "method": method}
    fields |= {n: read_field(data, "plan", n, int) for n in ("params_before", "align")}
    fields |= {n: read_number(data, "plan", n) for n in ("p", "gap")}
    if any(math.isnan(row.error) for row in layers):
        fields["gap"] = math.nan
    fields["latency"] = None if is_edited(data["layers"]) else read_latency(data.get("latency"))
    fields["bias_correction"] = data.get("bias_correction", False)
    if not isinstance(fields["bias_correction"], bool):
        raise PlanError(f"plan: bias_correction={fields['bias_correction']!r} is not true or false")
    return {**fields, "layers": layers}
