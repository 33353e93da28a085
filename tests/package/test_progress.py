"""Progress in Python: bars or a function, the same option everywhere."""

import io
import logging
import re
import time

import pytest
import torch
from rich.console import Console
from support.models import images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError
from alds_fast.progress import telling


@pytest.fixture
def screen(monkeypatch):
    """Standard error as a file, which is a terminal if told so."""
    text = io.StringIO()
    text.terminal = False
    monkeypatch.setattr(
        "rich.console.Console", lambda stderr: Console(file=text, force_terminal=text.terminal, width=80)
    )
    return text


def test_without_a_terminal_nothing_is_shown_unless_asked_for(screen):
    alds.analyze(small_net()).plan(params=0.5)
    assert screen.getvalue() == ""
    alds.analyze(small_net(), progress=True)
    assert "spectra" in screen.getvalue() and "100%" in screen.getvalue()


def test_a_terminal_shows_bars_of_every_part_unless_they_are_switched_off(screen):
    screen.terminal = True
    options = {"params": 0.6, "data": [images()], "refit": True, "groups": (1, 2)}
    alds.compress(small_net(), **options, progress=False)
    assert screen.getvalue() == ""
    alds.compress(small_net(), **options)
    parts = "spectra", "moments", "errors by rank", "factors", "refit"
    assert all(part in screen.getvalue() for part in parts)


def test_bars_tell_the_time_left(screen):
    screen.terminal = True
    with telling(None) as tell:
        tell("moments", 0, 100)
        for done in (25, 50):
            time.sleep(0.3)
            tell("moments", done, 100)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert re.search(r"moments .* 50% 0:00:\d\d left 0:00:\d\d", plain)


def test_a_function_is_told_all_of_the_work():
    told = []
    alds.compress(
        small_net(),
        params=0.6,
        data=[images(), images()],
        refit=True,
        groups=(1, 2),
        progress=lambda *x: told.append(x),
    )
    last = {what: (done, total) for what, done, total in told}
    assert list(last) == ["spectra", "moments", "errors by rank", "factors", "refit"]
    assert all(done == total for done, total in last.values()) and last["errors by rank"] == (4, 4)


def test_plans_and_factors_tell_too():
    told = []
    analysis = alds.analyze(small_net(), progress=False)
    plan = analysis.plan(params=0.5, progress=lambda *x: told.append(x))
    analysis.plan(params=0.4, progress=lambda *x: told.append(x))  # whose errors are known
    assert told == [("errors by rank", i, 4) for i in (1, 2, 3, 4)]
    plan.apply(small_net(), progress=lambda *x: told.append(x))
    assert told[-1] == ("factors", 4, 4)


def test_every_step_of_a_search_is_told():
    told = []
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    plan = alds.analyze(model).plan(
        quality=-9.0, evaluate=lambda m: -float(torch.ones(1)), progress=lambda *x: told.append(x[0])
    )
    steps = [text for text in told if text.startswith("quality")]
    assert steps == [f"quality -1 at {keep:.2%} of the parameters" for keep, _ in plan.quality.steps[1:]]


def test_anything_else_is_refused():
    for call in (alds.analyze, lambda m, **o: alds.compress(m, params=0.5, **o)):
        with pytest.raises(
            ArgumentError, match="progress='bar': expected True, False, None for bars on a terminal, or"
        ):
            call(small_net(), progress="bar")


def test_bars_end_with_what_is_raised(screen):
    screen.terminal = True
    with pytest.raises(KeyError), telling(None) as tell:
        tell("work", 1, 2)
        raise KeyError
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_what_is_left_out_and_measured_is_logged(caplog):
    model, x = small_net(), images()
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        analysis = alds.analyze(model, exclude="0")
        table = alds.deploy(analysis.plan(params=0.6).apply(model), x, rounds=1, report=True)[1]
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "3 of 4 layers can be decomposed; left out: '0': matched by exclude="
    assert texts[-1] == f"deploy: {table.decided}"  # whichever won
    with caplog.at_level(logging.WARNING, logger="alds_fast"):
        caplog.clear()
        alds.analyze(model)
    assert not caplog.records
