"""The state of a retraining on disk: one torch file of tensors and plain values, and the history as JSON lines."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoints import unique_tensors
from ..errors import ArgumentError, FileFormatError, FileWriteError, MissingFileError
from ..files import atomic, crc32, write_text

FORMAT = "alds_fast.retrain"
VERSION = 1
STATE, HISTORY = "state.pt", "history.jsonl"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state's tensors, not copied; ModelError for state that is no dense tensor with values."""
    kept, aliases = unique_tensors(model)
    return {**kept, **{name: kept[first] for name, first in aliases.items()}}


def state_crc32(model: nn.Module) -> int:
    """CRC-32 of names, types, shapes and values of the model's state."""
    rows = [(name, str(t.dtype), list(t.shape), crc32(t)) for name, t in tensors_of(model).items()]
    return zlib.crc32(json.dumps(rows).encode())


def json_value(value: Any) -> Any:
    """The value as JSON can hold it, to be compared; only the type of an object that has no such form."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [json_value(v) for v in value]
    return f"a {type(value).__name__}"


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of a ``DataLoader`` and its samplers, each once."""
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    generators = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def random_state(device: torch.device, loader: Iterable[Any] | None) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, the device's and the loader's."""
    numbers: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = {**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()}}
    state["cuda"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    state["loader"] = [g.get_state() for g in _generators(loader)]
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device, loader: Iterable[Any] | None) -> None:
    """Put back what :func:`random_state` found; ArgumentError if the loader has other generators now."""
    generators = _generators(loader)
    if len(generators) != len(state["loader"]):
        raise ArgumentError(
            f"loader= has {len(generators)} random generators, the checkpoint {len(state['loader'])}; give the "
            f"same loader"
        )
    random.setstate(state["python"])
    numbers = state["numpy"]
    key = np.array(numbers["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    for generator, state_of_loader in zip(generators, state["loader"], strict=True):
        generator.set_state(state_of_loader)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state, numpy's numbers as Python's, and the name of its type."""
    state = optimizer.state_dict()
    groups = [{k: v.item() if isinstance(v, np.generic) else v for k, v in g.items()} for g in state["param_groups"]]
    return {"kind": type(optimizer).__name__, "state": {**state, "param_groups": groups}}


def _settings(saved: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{k: repr(v) for k, v in group.items() if k != "params"} for group in saved["state"]["param_groups"]]


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put a saved state back; ArgumentError if it is of another kind or other settings, learning rates too."""
    kind, current, stored = type(optimizer).__name__, _settings(optimizer_state(optimizer)), _settings(saved)
    if (kind, current) != (saved["kind"], stored):
        pairs = zip(current, stored, strict=False)
        differ = sorted({k for a, b in pairs for k in a.keys() | b.keys() if a.get(k) != b.get(k)})
        raise ArgumentError(
            f"the checkpoint was made with {saved['kind']} and other settings ({', '.join(differ) or 'groups'}) than "
            f"this {kind} and its learning rates; give the same, or another directory"
        )
    optimizer.load_state_dict(dict(saved["state"]))


class Store:
    """The directory of one retraining, for which ``arguments`` (of JSON's types) must be the same at every call.

    Raises ArgumentError for what is no directory, MissingFileError if its parent does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ArgumentError(f"checkpoint={folder!r}: expected the name of a directory")
        self.folder, self.arguments = Path(folder).resolve(), dict(arguments)
        if self.folder.exists() and not self.folder.is_dir():
            raise ArgumentError(f"checkpoint={str(folder)!r} is a file: expected a directory")
        if not self.folder.parent.is_dir():
            raise MissingFileError(f"the directory {str(self.folder.parent)!r} does not exist; create it first")

    def read(self) -> dict[str, Any] | None:
        """The state written last, None if there is none yet.

        Raises FileFormatError for a file that is corrupt, foreign or newer, ArgumentError for one of other arguments.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        state = _load(path)
        if state["version"] > VERSION:
            raise FileFormatError(
                f"{str(path)!r} has version {state['version']}, newer than {VERSION}; update alds_fast"
            )
        names = sorted(state["arguments"].keys() | self.arguments.keys())
        pairs = [(n, state["arguments"].get(n), self.arguments.get(n)) for n in names]
        differ = [f"{name} was {old!r}, is {new!r}" for name, old, new in pairs if old != new]
        if differ:
            raise ArgumentError(
                f"the checkpoint {str(path)!r} is of another run: {'; '.join(differ)}. Give the same arguments, or "
                f"another directory"
            )
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state and the history, each atomically; FileWriteError if that fails."""
        head = {"format": FORMAT, "version": VERSION, "arguments": self.arguments}
        lines = "".join(json.dumps(record) + "\n" for record in state["history"])
        try:
            self.folder.mkdir(exist_ok=True)
            with atomic(self.folder / STATE) as temporary:
                torch.save({**head, **state}, temporary)
            write_text(self.folder / HISTORY, lines)
        except (OSError, RuntimeError) as e:
            raise FileWriteError(f"the checkpoint in {str(self.folder)!r} could not be written: {e}") from e


def _load(path: Path) -> dict[str, Any]:
    """The file's content, every byte checked by its CRC-32; nothing in it is executed."""
    remedy = "delete the directory to start anew"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise FileFormatError(f"{str(path)!r} is corrupt (CRC-32 of {bad!r} differs); {remedy}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as e:
        if isinstance(e, FileFormatError):
            raise
        raise FileFormatError(f"{str(path)!r} is not a whole checkpoint ({e}); {remedy}") from e
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileFormatError(f"{str(path)!r} was not written by alds_fast.retrain; {remedy}, or give another one")
    return state
