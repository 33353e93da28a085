"""Which linear layers have hidden units between them that can be removed: found in runs of the model, not by names.

A hidden unit is one output of each of the producers (gate_proj and up_proj, fc1) and one input of the consumer
(down_proj, fc2). Those are a group where, in a run, outputs of the producers at some places decide nothing but the
consumer's input at these, and the model runs with layers that lack them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...layers import DecomposableLayer, is_plain_linear, narrow_layer, oriented_weight, replace_layers
from ...measurement import as_written, first_input, output_tensors, private_runs

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class HiddenUnits:
    """``count`` units between layers: outputs of the producers, inputs of the consumer."""

    producers: tuple[str, ...]
    consumer: str
    count: int

    @property
    def layers(self) -> tuple[str, ...]:
        """All names."""
        return (*self.producers, self.consumer)


class _Call(NamedTuple):
    name: str
    x: Tensor
    version: int


def find_hidden_units(
    model: nn.Module, layers: Sequence[DecomposableLayer], inputs: Any, called: str
) -> list[HiddenUnits]:
    """The groups among these layers, in the order in which the model calls them; no layer is in two of them.

    ``called`` is what errors call the inputs. Three or four runs of the model on them, where there are groups, and one
    more for each where not all are what they seem. What the consumers are given is kept meanwhile.
    """
    linear = {x.name: x for x in layers if is_plain_linear(x.module) and (x.own_bias or x.module.bias is None)}
    with torch.no_grad(), as_written(), private_runs(model) as run:
        calls, outputs = _calls(model, linear, lambda: run(inputs, 0, called))
        hidden = {call.name: call.x for call in calls}
        groups = _candidates(calls, linear)
        if not groups:
            return []

        def seen(of: Sequence[HiddenUnits]) -> tuple[list[HiddenUnits], bool]:
            """Those whose consumers saw what they would, and whether the model's outputs are what they were."""
            good, output = _masked(model, of, hidden, lambda: run(inputs, 0, called))
            return good, bool(good) and output is not None and _same(output, outputs)

        before: list[HiddenUnits] = []
        same = False
        while not same and groups != before:
            before, (groups, same) = groups, seen(groups)
        if not same:
            groups = [group for group in groups if seen([group])[1]]

    def runs(of: Sequence[HiddenUnits]) -> bool:
        """Whether the model runs, with outputs of the same shapes, with one hidden unit less in these groups."""
        output = _without_one(model, of, inputs, called)
        return output is not None and [y.shape for y in output] == [y.shape for y in outputs]

    if groups and not runs(groups):
        groups = [group for group in groups if runs([group])]
    _LOG.info("hidden units between layers: %d groups", len(groups))
    return groups


def _calls(model: nn.Module, linear: Mapping[str, DecomposableLayer], run: Any) -> tuple[list[_Call], list[Tensor]]:
    """What the layers are called with, in order, and the model's outputs."""
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            calls.append(_Call(name, x, 0 if x.is_inference() else x._version))

        return hook

    with ExitStack() as stack:
        for name, layer in linear.items():
            stack.callback(layer.module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        output = run()
    return calls, output_tensors(output)


def _candidates(calls: Sequence[_Call], linear: Mapping[str, DecomposableLayer]) -> list[HiddenUnits]:
    """Layers called one after the other, the first ones with one input and as many outputs as the last has inputs.

    Of groups with a layer in common the one with most units.
    """
    times: dict[str, int] = {}
    for call in calls:
        times[call.name] = times.get(call.name, 0) + 1
    groups: list[HiddenUnits] = []
    for at, call in enumerate(calls):
        count, producers = linear[call.name].shape.in_channels, list[_Call]()
        for before in reversed(calls[:at]):
            alike = not producers or (before.x is producers[0].x and before.version == producers[0].version)
            if not alike or linear[before.name].shape.out_channels != count or before.x is call.x:
                break
            producers.append(before)
        group = HiddenUnits(tuple(p.name for p in reversed(producers)), call.name, count)
        if producers and count > 1 and all(times[name] == 1 for name in group.layers):
            groups.append(group)
    chosen: list[HiddenUnits] = []
    for group in sorted(groups, key=lambda group: -group.count):  # wide between narrow layers, not the other way round
        if not any({*group.layers} & {*other.layers} for other in chosen):
            chosen.append(group)
    return [group for group in groups if group in chosen]


def _masked(
    model: nn.Module, groups: Sequence[HiddenUnits], hidden: Mapping[str, Tensor], run: Any
) -> tuple[list[HiddenUnits], list[Tensor] | None]:
    """Half of the producers' outputs are 0, and the consumers get what they got before.

    The groups whose consumers would have got the same at all other places, bit for bit, and the model's outputs; all
    groups and None where it raises an error.
    """
    generator, good = torch.Generator().manual_seed(0), list(groups)
    with ExitStack() as stack:
        for group in groups:
            gone = torch.randperm(group.count, generator=generator, device="cpu")[: group.count // 2]

            def mask(module: nn.Module, args: Any, y: Tensor, gone: Tensor = gone) -> Tensor:
                return y.index_fill(-1, gone.to(y.device), 0.0)

            def put_back(
                module: nn.Module, args: Any, kwargs: Any, gone: Tensor = gone, group: HiddenUnits = group
            ) -> Any:
                x, before = first_input(args, kwargs), hidden[group.consumer]
                at = gone.to(x.device)
                alike = x.shape == before.shape and x.dtype == before.dtype
                if not (alike and torch.equal(x.index_fill(-1, at, 0.0), before.index_fill(-1, at, 0.0))):
                    good.remove(group)
                return (before, *args[1:]) if args else args, kwargs if args else {**kwargs, "input": before}

            for name in group.producers:
                stack.callback(model.get_submodule(name).register_forward_hook(mask).remove)
            consumer = model.get_submodule(group.consumer)
            stack.callback(consumer.register_forward_pre_hook(put_back, with_kwargs=True).remove)
        output = _outputs(run)
        return list(groups) if output is None else good, output


def _outputs(run: Any) -> list[Tensor] | None:
    """What a run of the changed model gives; None where it raises an error, as it is not what it would have to be."""
    try:
        return output_tensors(run())
    except Exception as e:
        _LOG.info("hidden units: a changed run raised %s: %s", type(e).__name__, e)
        return None


def _without_one(model: nn.Module, groups: Sequence[HiddenUnits], inputs: Any, called: str) -> list[Tensor] | None:
    """The outputs of the model with one hidden unit less in every group, None where it does not run."""
    new: dict[str, nn.Module] = {}
    for group in groups:
        for name in group.layers:
            module: Any = model.get_submodule(name)
            weight, bias, out = oriented_weight(module), module.bias, name != group.consumer
            bias = bias if bias is None else bias.detach()[: group.count - 1] if out else bias.detach()
            new[name] = narrow_layer(module, weight[: group.count - 1] if out else weight[:, : group.count - 1], bias)
    narrow = replace_layers(model, new, share=True)
    with torch.no_grad(), as_written(), private_runs(narrow) as run:
        return _outputs(lambda: run(inputs, 0, called))


def _same(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(outputs) == len(others) and all(map(torch.equal, outputs, others))
