"""The zoo: ten small families go all the way; what fails is told, and the others go on."""

import json
import os
import re
import time
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.zoo import __main__ as run
from benchmarks.zoo import libraries, of_torch, table
from benchmarks.zoo.case import Case, tokens
from benchmarks.zoo.trial import Trial

NARROW = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "embedding_size": 16, "d_model": 64}
NARROW |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "conv_dim": (16,) * 3}
FAMILIES = ["llama", "gemma2", "falcon", "bloom", "mixtral, open_experts", "albert", "whisper", "wav2vec2", "vit"]
EXPORTED = {"falcon"}  # takes a second


def narrow(name):
    """A family of transformers at a width of 64."""
    case = run.CASES[f"transformers/{name}"]
    model, options = case.build.args
    small = {key: NARROW.get(key, value) for key, value in options.items()}
    return case._replace(build=partial(case.build.func, model, small))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name):
    pytest.importorskip("transformers")
    row = Trial(narrow(name), export=name in EXPORTED).run()
    assert "failed" not in row and row["low_rank"] >= 4 and row["kept"] <= row["asked"] < 0.7
    assert row.get("export") == ("yes" if name in EXPORTED else None)
    assert {"run", "save and load", "compare"} <= set(row["seconds"])


def test_a_family_of_torch_of_which_little_is_eligible():
    row = Trial(Case("torch/lstm", lambda: of_torch.Tagger(nn.LSTM, 32), lambda: tokens(5, 500))).run()
    assert "failed" not in row and row["export"] == "yes"
    assert row["asked"] > 0.5 and row["kept"] <= row["asked"] and row["eligible"] < 0.5
    assert [reason.partition(":")[0] for reason in row["left_out"]] == ["Embedding", "LSTM"]


class Unsaved(nn.Sequential):
    """Its state is more than tensors, so that it cannot be saved."""

    def get_extra_state(self):
        return "text"

    def set_extra_state(self, state):
        assert state == "text"


def killed():
    os._exit(3)


CASES = {
    "zoo/good": Case("zoo/good", lambda: nn.Sequential(nn.Linear(32, 32)), lambda: torch.ones(1, 32)),
    "zoo/unsaved": Case("zoo/unsaved", lambda: Unsaved(nn.Linear(32, 32)), lambda: torch.ones(1, 32)),
    "zoo/killed": Case("zoo/killed", killed, lambda: None),
    "zoo/slow": Case("zoo/slow", lambda: time.sleep(60), lambda: None),
}


def test_a_process_each_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CASES", CASES)
    run.run(["zoo/[!s]*"], tmp_path, limit=100)
    rows = run.run(["*slow"], tmp_path, limit=1)
    assert [row["name"] for row in rows] == list(CASES)
    failed = {row["name"]: row.get("failed", "") for row in rows}
    assert failed["zoo/good"] == "" and failed["zoo/unsaved"].startswith(
        "save and load: ModelError: state '_extra_state'"
    )
    assert failed["zoo/killed"] == "its process ended with exit code 3 in step 'build'"
    assert failed["zoo/slow"] == "killed after 1 s in step 'build'"
    table.write_results(rows, tmp_path)
    text = (tmp_path / "zoo.md").read_text()
    assert re.search(r"\| zoo \| 4 \| 3 \| 1 \| 1 \| \d+, good \|", text)
    assert "**failed**: its process ended with exit code 3" in text
    assert [row["name"] for row in json.loads((tmp_path / "zoo.json").read_text())["rows"]] == list(CASES)

    monkeypatch.setattr(run, "CASES", {**CASES, "zoo/good": CASES["zoo/killed"]._replace(name="zoo/good")})
    assert run.run(["*goo*"], tmp_path, limit=100) == rows  # what is there is not done again


def test_boxes_that_overlap_no_better_one():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [4, 4, 8, 8], [0, 0, 2, 4]])
    scores = torch.tensor([0.8, 0.9, 0.1, 0.7])
    assert libraries.kept_boxes(boxes, scores, 0.6).tolist() == [1, 3, 2]
    assert libraries.kept_boxes(boxes, scores, 0.3).tolist() == [1, 2]
