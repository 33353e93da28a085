"""The cycles of compressing and retraining, and how a killed run goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checkpoints import assign, rebuild, structure
from ..errors import ArgumentError, ModelError
from ..layers import LowRankLayer, annotate, count_params, narrowed_sizes, replace_layers
from ..measurement import device_of
from ..planning import Plan
from ..planning import compress as compress_once
from .loop import Recipe, learning_rates, rewound, run_epoch, training
from .state import Store, load_optimizer, optimizer_state, random_state, set_random_state, tensors_of

Log = Callable[[dict[str, Any]], Any]
Train = Callable[[nn.Module, int, int, Log], Any]
Compress = Callable[[nn.Module, float, int], nn.Module]


@dataclass
class State:
    """A model in its cycle (from 0), with ``epoch`` of its retraining's epochs done."""

    model: nn.Module
    cycle: int = 0
    epoch: int = 0
    plans: list[Plan | None] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)  # model and random state before every compression


@dataclass(frozen=True)
class Pipeline:
    """One retraining of the dense model; ``recipe`` or ``train`` is given."""

    dense: nn.Module
    keep: tuple[float, ...]
    compress: Mapping[str, Any] | Compress
    recipe: Recipe | None
    train: Train | None
    epochs: int
    epochs_retrain: int
    store: Store | None
    log: Log | None

    @property
    def random_place(self) -> tuple[torch.device, Iterable[Any] | None]:
        """Where random numbers come from: the model's device, and the loader, whose generators count too."""
        return device_of(self.dense), self.recipe.loader if self.recipe else None

    def run(self) -> State:
        """All cycles, from the state on disk if there is one; the state of the last one."""
        saved = self.store.read() if self.store else None
        state = self._restore(saved) if saved else self._begun(State(self.dense, cycle=-1))
        while True:
            if self.recipe is not None:
                self._train_epochs(state, self.recipe)
            elif state.epoch < self.epochs_retrain:
                self._train_whole(state)
            if state.cycle + 1 == len(self.keep):
                return state
            state = self._begun(state)

    def _begun(self, last: State) -> State:
        """The next cycle: the model, its low-rank layers dense again, is compressed."""
        cycle, starts = last.cycle + 1, last.starts
        if isinstance(self.compress, Mapping):
            if not cycle and len(self.keep) > 1:  # a last budget that cannot be met is refused before the first cycle
                self._compress(self.dense, len(self.keep) - 1)
        elif self.store:
            tensors = tensors_of(last.model) if cycle else None
            starts = [*starts, {"tensors": tensors, "random": random_state(*self.random_place)}]
        model = self._compress(last.model, cycle)
        plan = getattr(model, "alds_plan", None)
        plans = [*last.plans, plan if isinstance(plan, Plan) else None]
        state = State(model, cycle, 0, plans, last.history, None, starts)
        self._save(state)
        return state

    def _compress(self, model: nn.Module, cycle: int) -> nn.Module:
        if isinstance(self.compress, Mapping):
            dense = model if model is self.dense else _recompose(model)
            return compress_once(dense, params=self.keep[cycle], **self.compress)
        small = self.compress(_recompose(model), self.keep[cycle], cycle)
        if not isinstance(small, nn.Module):
            raise ModelError(f"compress= returned a {type(small).__name__}: expected the compressed torch.nn.Module")
        return small

    def _train_epochs(self, state: State, recipe: Recipe) -> None:
        first = recipe.epochs - recipe.epochs_retrain
        optimizer, scheduler = rewound(recipe, state.model, first + state.epoch)
        if state.optimizer is not None:
            load_optimizer(optimizer, state.optimizer)
        for epoch in range(state.epoch, recipe.epochs_retrain):
            begin, rates = time.perf_counter(), learning_rates(optimizer)
            with training(state.model):
                loss = run_epoch(recipe, state.model, optimizer, self.dense)
            if scheduler is not None:
                scheduler.step()
            state.epoch, state.optimizer = epoch + 1, optimizer_state(optimizer)
            record = {"epoch": epoch, "rewound_epoch": first + epoch, "learning_rates": rates, "loss": loss}
            self._record(state, {**record, "seconds": time.perf_counter() - begin})
            self._save(state)
            self._tell(state)

    def _train_whole(self, state: State) -> None:
        assert self.train is not None

        def log(record: Mapping[str, Any]) -> None:
            self._record(state, record)
            self._tell(state)

        with training(state.model):
            self.train(state.model, self.epochs - self.epochs_retrain, self.epochs, log)
        state.epoch = self.epochs_retrain
        self._save(state)

    def _record(self, state: State, record: Mapping[str, Any]) -> None:
        head = {"cycle": state.cycle, "keep": self.keep[state.cycle], "params": count_params(state.model)}
        try:
            state.history.append(json.loads(json.dumps({**head, **record}, default=_number)))
        except (TypeError, ValueError) as e:
            raise ArgumentError(f"log({record!r}): expected a dict of numbers and texts ({e})") from e

    def _tell(self, state: State) -> None:
        if self.log is not None:
            self.log(dict(state.history[-1]))

    def _save(self, state: State) -> None:
        if self.store is None:
            return
        frozen = [name for name, p in state.model.named_parameters() if not p.requires_grad]
        saved = {"cycle": state.cycle, "epoch": state.epoch, "history": state.history, "optimizer": state.optimizer}
        saved |= {"layers": structure(state.model), "narrowed": narrowed_sizes(state.model)}
        saved |= {"tensors": tensors_of(state.model), "frozen": frozen}
        saved |= {"plans": [plan and plan.to_json() for plan in state.plans], "starts": state.starts}
        self.store.write({**saved, "random": random_state(*self.random_place)})

    def _restore(self, saved: Mapping[str, Any]) -> State:
        plans = [text and Plan.from_json(text) for text in saved["plans"]]
        structures = saved["layers"], saved.get("narrowed", {})
        model = rebuild(self.dense, *structures) if isinstance(self.compress, Mapping) else self._replay(saved)
        assign(model, saved["tensors"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in saved["frozen"])
        if plans[-1] is not None:
            annotate(model, plan=plans[-1])
        set_random_state(saved["random"], *self.random_place)
        state = State(model, saved["cycle"], saved["epoch"], plans, saved["history"])
        state.optimizer, state.starts = saved["optimizer"], saved["starts"]
        return state

    def _replay(self, saved: Mapping[str, Any]) -> nn.Module:
        """The cycle's model with the structure of what a function of the user's made, by calling it again."""
        model = self.dense
        for cycle, start in enumerate(saved["starts"]):
            if cycle:
                assign(model, start["tensors"])
            set_random_state(start["random"], *self.random_place)
            model = self._compress(model, cycle)
        return model


def _recompose(model: nn.Module) -> nn.Module:
    """A copy of the model in which the low-rank layers are dense again."""
    layers = {n: m.to_dense() for n, m in model.named_modules() if isinstance(m, LowRankLayer)}
    dense = replace_layers(model, layers)
    for name in ("alds_plan", "alds_factors"):
        vars(dense).pop(name, None)
    return dense


def _number(value: Any) -> Any:
    """A number of numpy's or torch's as Python's; TypeError for anything else."""
    if not hasattr(value, "item"):
        raise TypeError(f"a {type(value).__name__} is not a number")
    return value.item()
