"""``alds-fast compress`` and ``show`` of a checkpoint directory."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..allocation import BASELINES
from ..checkpoints import (
    PLAN,
    Shards,
    compress_checkpoint,
    compressed_layers,
    config_of,
    from_pretrained,
    one_block_at_a_time,
    open_shards,
)
from ..errors import ArgumentError
from ..integrations import transformers_name
from ..measurement import KL
from ..progress import telling
from ..text import shape_text, table
from .arguments import as_pins
from .eval import check_data_flags
from .log_lines import log_lines
from .texts import calibration, is_function, perplexity, read_windows

_MODEL_ONLY = ("weights", "flops", "quality", "evaluate", "latency", "input", "plot")
_NEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # where they are decoders, of the token that comes
_LANGUAGE = (*_NEXT, "ForMaskedLM")  # models whose outputs are logits of tokens
NO_DATA = (
    "note: by their weights alone language models measured as useless after compression; pass --data {data} "
    "--sensitivity"
)
MOST_WINDOWS = 64  # of a text that is only looked at
Text = tuple[str, Tensor]  # a name, and windows of tokens


def show_layers(folder: str, as_json: bool) -> None:
    """Print what config.json says of a compressed directory without a plan, as ``save_pretrained`` writes it."""
    layers = compressed_layers(folder)
    if as_json:
        print(json.dumps({"layers": layers}))
        return
    names = ("scheme", "groups", "rank", "pivots")
    rows = [[name, shape_text(fields["shape"]), *(str(fields.get(k, "")) for k in names)]
            for name, fields in layers.items()]  # fmt: skip
    print(table(["layer", "shape", *names], rows))
    print(
        f"{len(layers)} low-rank layers; the others, the budget and the errors would be in {PLAN}, which is not there"
    )


def compress_directory(args: argparse.Namespace, first: bool) -> None:
    """Run it; the ``first`` of several processes prints the result."""
    other = [name for name in _MODEL_ONLY if getattr(args, name)]
    other += ["method"] if args.method in BASELINES else []
    if other:
        flag = other[0].replace("_", "-")
        raise ArgumentError(
            f"--{flag} does not go with a checkpoint directory; name a function that returns the model instead"
        )
    if not 0 < args.max_shard_gb < math.inf:
        raise ArgumentError(f"--max-shard-gb {args.max_shard_gb:g} is not a positive number")
    check_data_flags(args)
    shards = open_shards(args.target)
    kind = str((shards.config.get("architectures") or [""])[0])
    batches, texts = _data(args, shards, kind)
    same = ("params", "memory", "error", "p", "align", "schemes", "include", "exclude", "pivots", "criterion", "refit")
    options: dict[str, Any] = {name: getattr(args, name) for name in (*same, "blocks", "min_rank", "hidden_units")}
    options |= {
        "data": batches,
        "pins": as_pins(args.pin),
        "sensitivity": args.sensitivity and (KL if kind.endswith(_LANGUAGE) else True),
        "groups": args.groups or "auto",
        "refine": args.refine or False,
        "device": args.device,
    }
    options |= {"precision": args.precision or "float32"}
    with log_lines(), telling(None) as progress:
        done = compress_checkpoint(
            args.target, args.output, max_shard_bytes=round(args.max_shard_gb * 1e9), progress=progress, **options
        )
    if not first:
        return
    methods = dict(Counter(report.method for report in done.factors.values()))
    rows = _perplexities(kind, args.target, done.folder, texts)
    if args.json:
        summary = {"output": str(done.folder), "factors": methods, "params": done.plan.params}
        summary |= {"perplexity": {name: list(values) for name, *values in rows}} if rows else {}
        print(json.dumps({**summary, "plan": json.loads(done.plan.to_json())}))
        return
    print(done.plan)
    print(f"factors: {', '.join(f'{n} {m}' for m, n in sorted(methods.items())) or 'none'}")
    print(f"wrote {done.folder}: load it with alds_fast.from_pretrained")
    if rows:
        print(table(["text", "perplexity, dense", "compressed"], [[n, f"{a:.4g}", f"{b:.4g}"] for n, a, b in rows]))
    if batches is None and methods and kind.endswith(_LANGUAGE):
        two = shards.config.get("is_encoder_decoder")
        print(NO_DATA.format(data="file.py:function" if two else "calibration.txt"))


def _data(args: argparse.Namespace, shards: Shards, kind: str) -> tuple[list[Any] | None, list[Text]]:
    """Batches of --data, None without, and texts on which perplexities are told: what is kept aside, and --also."""
    written = bool(args.data) and not is_function(args.data)
    speaks = config_of(shards).get_text_config() if written else None  # that of the texts, if there are pictures
    longest = getattr(speaks, "max_position_embeddings", None)
    if isinstance(longest, int) and args.sequence > longest:
        raise ArgumentError(f"--sequence {args.sequence} is more than the {longest} positions that the model has")
    if speaks is not None and speaks.is_encoder_decoder:
        first = getattr(transformers_name(kind), "main_input_name", "input_ids")
        raise ArgumentError(
            f"--data {args.data!r}: {kind or 'the model'} has an encoder and a decoder, which want inputs each: pass "
            f"file.py:function that returns batches with {first} and decoder_input_ids"
        )
    words = args.target, args.sequence, getattr(speaks, "vocab_size", None)
    batches, aside = calibration(args.data, *words, args.tokens) if args.data else (None, None)
    texts = [] if aside is None or not kind.endswith(_NEXT) else [(f"{args.data}, kept aside", aside)]
    if args.also and not texts:
        raise ArgumentError("--also goes with a text as --data, and a model that foretells the next token")
    if args.also:
        texts.append((args.also, read_windows(args.also, *words)[:MOST_WINDOWS]))
    return batches, texts


def _perplexities(kind: str, source: str, compressed: Path, texts: Sequence[Text]) -> list[tuple[str, float, float]]:
    """Of the texts, by the dense model, of that class, and by the compressed one."""
    if not texts:
        return []
    dense = transformers_name(kind).from_pretrained(source, dtype="auto", local_files_only=True)
    with one_block_at_a_time(dense, Path(source)):
        before = [perplexity(dense, windows) for _, windows in texts]
    del dense
    small = from_pretrained(compressed, dtype="auto")
    with one_block_at_a_time(small, compressed):
        return [(name, old, perplexity(small, w)) for (name, w), old in zip(texts, before, strict=True)]
