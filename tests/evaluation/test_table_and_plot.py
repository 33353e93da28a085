"""Tables and pictures of an evaluation that is written by hand."""

import csv
import errno
import io
import json
import math
import os

import numpy as np
import pytest

import alds_fast as alds
from alds_fast.errors import ArgumentError, FileWriteError
from alds_fast.evaluation.plot import _ticks
from alds_fast.evaluation.table import COLUMNS


def _row(variant, share, seed, quality, after=None, status="done", dense=0.9):
    row = dict.fromkeys(COLUMNS) | {"variant": variant, "share": share, "seed": seed, "status": status}
    row |= {"budget": "params", "params": share - 0.01, "quality_dense": dense, "quality": quality, "error": 0.25}
    row |= {"quality_after": after, "drop": None if quality is None else dense - quality, "message": ""}
    return row | {"drop_after": None if after is None else dense - after, "p": math.inf}


BY_HAND = alds.Evaluation(
    [
        *(_row("a|b", 0.5, 0, 0.8), _row("a|b", 0.5, 1, 0.9), _row("a|b", 0.3, 0, 0.7), _row("a|b", 0.3, 1, 0.7)),
        *(_row("c", 0.5, 0, 0.895), _row("c", 0.5, 1, 0.895), _row("c", 0.3, 0, 0.5)),
        _row("c", 0.3, 1, None, status="failed"),
    ],
    "params",
)


def test_markdown_by_hand():
    assert BY_HAND.to_markdown() == (
        "Dense quality: 0.9 ± 0. Means over 2 seeds, ± one standard deviation.\n\n"
        "### params = 0.5\n\n"
        "| variant | quality | drop | params kept | largest error | cells |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| a\\|b | 0.85 ± 0.071 | 0.05 ± 0.071 | 49.00% | 0.25 ± 0 | 2 |\n"  # sqrt(2 * .05**2 / 1) = .0707
        "| c | **0.895 ± 0** | 0.005 ± 0 | 49.00% | 0.25 ± 0 | 2 |\n\n"
        "### params = 0.3\n\n"
        "| variant | quality | drop | params kept | largest error | cells |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| a\\|b | **0.7 ± 0** | 0.2 ± 0 | 29.00% | 0.25 ± 0 | 2 |\n"
        "| c | 0.5 | 0.4 | 29.00% | 0.25 | 1 of 2, 1 failed |\n"
    )
    assert str(BY_HAND) == BY_HAND.to_markdown()


def test_csv_and_json_by_hand():
    lines = list(csv.DictReader(io.StringIO(BY_HAND.to_csv())))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 8
    assert (lines[0]["variant"], lines[0]["quality"], lines[0]["p"], lines[0]["method"]) == ("a|b", "0.8", "inf", "")
    assert lines[7]["status"] == "failed" and lines[7]["quality"] == ""
    data = json.loads(BY_HAND.to_json())
    assert data["rows"][0]["p"] == "inf" and data["rows"][7]["quality"] is None and data["budget"] == "params"
    assert data["summary"][0]["quality"] == pytest.approx(0.85) and data["summary"][3]["done"] == 1


def test_best_and_largest_reduction_by_hand():
    assert BY_HAND.best(0.5) == "c" and BY_HAND.best(0.3) == "a|b"  # c is not done for all seeds
    with pytest.raises(ArgumentError, match=r"share=0.4 was not evaluated; it was 0.5, 0.3"):
        BY_HAND.best(0.4)
    assert BY_HAND.largest_reduction() == {"a|b": 0.0, "c": pytest.approx(0.51)}
    assert BY_HAND.largest_reduction(drop=0.06) == {"a|b": pytest.approx(0.51), "c": pytest.approx(0.51)}
    assert BY_HAND.largest_reduction(drop=0.5) == {"a|b": pytest.approx(0.71), "c": pytest.approx(0.51)}
    assert BY_HAND.largest_reduction(x="flops") == {"a|b": 0.0, "c": 0.0}
    with pytest.raises(ArgumentError, match="x='bytes'"):
        BY_HAND.largest_reduction(x="bytes")
    retrained = alds.Evaluation([_row("a", 0.5, 0, 0.8, 0.9), _row("b", 0.5, 0, 0.85, 0.86)], "params")
    assert retrained.best(0.5) == "a" and retrained.largest_reduction() == {"a": pytest.approx(0.51), "b": 0.0}
    assert "| a | 0.8 | 0.1 | **0.9** | 0 |" in retrained.to_markdown()
    failed = alds.Evaluation([_row("a", 0.5, 0, None, status="failed")], "params")
    with pytest.raises(ArgumentError, match="no variant is done for all seeds at params=0.5"):
        failed.best(0.5)
    assert "| a | - | - | - | - | 0 of 1, 1 failed |" in failed.to_markdown()


def _picture(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.slow
def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    BY_HAND.plot(tmp_path / "p.png")
    image = _picture(tmp_path / "p.png")
    assert min(image.shape[:2]) > 400 and image[..., :3].std() > 0.05
    for colour in ("#0072B2", "#D55E00"):  # both lines are there
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (abs(image[..., :3] - rgb).max(-1) < 0.02).sum() > 100
    retrained = alds.Evaluation([_row("a", s, 0, 0.8, 0.9) for s in (0.9, 0.1, 0.02)], "params")
    retrained.plot(tmp_path / "after.png")
    assert _picture(tmp_path / "after.png").shape[1] > 1.5 * image.shape[1]  # two panels
    with pytest.raises(ArgumentError, match="flops need example_inputs="):
        BY_HAND.plot(tmp_path / "f.png", x="flops")
    with pytest.raises(ArgumentError, match="does not end in"):
        BY_HAND.plot(tmp_path / "p.xyz")


def test_ticks_of_a_logarithmic_axis():
    assert _ticks(4.0, 60.0) == [5.0, 10.0, 20.0, 50.0] and _ticks(0.5, 5.0) == [0.5, 1.0, 2.0, 5.0]


def test_what_cannot_be_written_is_an_error_of_ours_and_leaves_the_old(tmp_path, monkeypatch):
    BY_HAND.plot(tmp_path / "p.png")
    old = (tmp_path / "p.png").read_bytes()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for write in (lambda: BY_HAND.plot(tmp_path / "p.png"), lambda: BY_HAND.save(tmp_path)):
        with pytest.raises(FileWriteError, match="No space left on device.*is unchanged"):
            write()
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"] and (tmp_path / "p.png").read_bytes() == old
