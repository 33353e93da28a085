"""Functions and models that the command line names: ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from ..errors import AldsError, ArgumentError, FileFormatError, MissingFileError, ModelError

TARGET_HELP = (
    "package.module:function or file.py:function that returns the model; for compress also a checkpoint directory: "
    "config.json and safetensors files"
)


def _module(name: str) -> ModuleType:
    """A module by dotted name or by the path of a .py file, which runs once in a process."""
    if not name.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise MissingFileError(f"{name!r} does not exist")
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[spec.name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


class Target:
    """A function by its name. It is found where it is first used, so that it can be sent to other processes."""

    def __init__(self, name: str) -> None:
        self.name = name
        place, _, function = name.rpartition(":")
        if not place or not function:
            hint = "; a checkpoint directory goes to alds-fast compress" if Path(name).is_dir() else ""
            raise ArgumentError(f"{name!r}: expected package.module:function or file.py:function{hint}")

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself; ModelError, with the traceback on standard error, if it cannot be loaded."""
        place, _, function = self.name.rpartition(":")
        module = self._guard(lambda: _module(place))
        if not hasattr(module, function):
            here = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[:1] != "_"]
            raise ModelError(f"{place!r} has no {function!r}; its functions are {', '.join(here) or 'none'}")
        loaded: Callable[..., Any] = getattr(module, function)
        return loaded

    def batches(self) -> Any:
        """What it returns without arguments; ModelError, with the traceback on standard error, if it raises."""
        return self._guard(lambda: self.function())

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except AldsError:
            raise
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            raise ModelError(f"{self.name!r} could not be called: {type(e).__name__}: {e}") from e

    @property
    def takes_seed(self) -> bool:
        """Whether it has a parameter called seed."""
        function = self.function
        try:
            return "seed" in inspect.signature(function).parameters
        except (TypeError, ValueError):  # not a function, or one that does not tell
            return False

    def __call__(self, *args: Any) -> Any:
        """Call it; what it raises goes through."""
        return self.function(*args)


class SeededTarget(Target):
    """A function whose last argument is a seed, which it is given, by name, where it has a parameter of that name."""

    def __call__(self, *args: Any) -> Any:
        *others, seed = args
        return self.function(*others, seed=seed) if self.takes_seed else self.function(*others)


class ModelTarget(SeededTarget):
    """A function that returns a model, and a file of weights that are loaded into it."""

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__(name)
        self.weights = weights

    def __call__(self, *args: Any) -> nn.Module:
        """The model; ModelError if the function raised, or returned something else."""
        model = self._guard(lambda: super(ModelTarget, self).__call__(*(args or (0,))))
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.name!r} returned a {type(model).__name__}, not a torch.nn.Module")
        if self.weights:
            _load_weights(model, self.weights)
        return model


def _load_weights(model: nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise MissingFileError(f"--weights {path!r} does not exist")
    try:
        load_model(model, path)
    except SafetensorError as e:
        raise FileFormatError(f"--weights {path!r} is not a whole safetensors file ({e})") from e
    except RuntimeError as e:
        raise ModelError(f"--weights {path!r} does not fit the model: {e}") from e


def model_and_input(args: argparse.Namespace, dtype: torch.dtype | None) -> tuple[nn.Module, torch.Tensor]:
    """The model of --model and an input of the shape of --input, of the type and on the device that were asked for."""
    if args.input is None:
        raise ArgumentError("--model needs --input, the shape of its input, for example 1,3,224,224")
    model = ModelTarget(args.model, args.weights)()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(args.input, generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        return model.to(device, dtype), x.to(device, dtype)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built for CUDA
        raise ArgumentError(f"--device {device}: {e}") from e
