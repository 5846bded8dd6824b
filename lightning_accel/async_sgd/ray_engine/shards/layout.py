"""How the parameters of a run are shared out among shards, and put together again."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers, dumps
from lightning_accel.async_sgd.policy.stepping import get_groups
from lightning_accel.async_sgd.store import Opening, Snapshot

Layout = list[list[int]]  # of each shard: places of its parameters among all, rising


def share_out(parameters: Sequence[Tensor], shards: int) -> Layout:
    """Return which parameters lie on which shard, so that all hold about as many bytes; every shard has at least one.

    Whole parameters, the largest first, each to the shard that has least.

    Args:
        parameters: Of the run.
        shards: How many there are at most.
    """
    count = max(1, min(shards, len(parameters)))
    layout: Layout = [[] for _ in range(count)]
    loads = [0] * count
    sizes = [p.numel() * p.element_size() for p in parameters]
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        shard = min(range(count), key=lambda s: (loads[s], len(layout[s])))
        layout[shard].append(place)
        loads[shard] += sizes[place]
    return [sorted(places) for places in layout]


def can_be_split(optimizers: Sequence[Optimizer]) -> bool:
    """Whether each optimizer treats every parameter on its own, so that shards make the steps that one server makes.

    True of those that come with torch. Nobody knows of others (some estimate one rate from all gradients).
    """
    return all(type(optimizer).__module__.startswith("torch.optim.") for optimizer in optimizers)


def split(opening: Opening, layout: Layout) -> list[Opening]:
    """Return the part of each shard: its parameters, and optimizers over them with their state. Buffers stay behind."""
    opening = replace(opening, buffer_names=[], buffers=[], buffer_roles=[], epochs=[])
    if len(layout) == 1:
        return [opening]
    same: dict[int, Tensor] = {id(p): p for p in opening.parameters}
    parts = []
    for places in layout:
        mine = {id(opening.parameters[place]) for place in places}
        optimizers = copy_optimizers(opening.optimizers, same)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) in mine]
            for parameter in [p for p in optimizer.state if id(p) not in mine]:
                del optimizer.state[parameter]
        names = [opening.names[place] for place in places]
        parameters = [opening.parameters[place] for place in places]
        parts.append(replace(opening, names=names, parameters=parameters, optimizers=optimizers))
    return parts


def merge(parts: Sequence[Opening], layout: Layout, order: Sequence[Sequence[Sequence[int]]]) -> Opening:
    """Return all parameters, and optimizers over them, of the parts that shards have.

    Args:
        parts: Of each shard.
        layout: Of the run.
        order: Of each optimizer and group: the places of its parameters.
    """
    if len(layout) == 1:
        return parts[0]
    count = sum(map(len, layout))
    names = [""] * count
    parameters: list[Any] = [None] * count
    for places, part in zip(layout, parts, strict=True):
        for place, name, parameter in zip(places, part.names, part.parameters, strict=True):
            names[place], parameters[place] = name, parameter
    optimizers = parts[0].optimizers
    for which, optimizer in enumerate(optimizers):
        found = {id(p): state for part in parts for p, state in part.optimizers[which].state.items()}
        optimizer.state.clear()
        for group, of_group in zip(optimizer.param_groups, order[which], strict=True):
            group["params"] = [parameters[place] for place in of_group]
            optimizer.state.update({p: found[id(p)] for p in group["params"] if id(p) in found})  # in this order
    return replace(parts[0], names=names, parameters=parameters, optimizers=optimizers)


def places_of_groups(opening: Opening) -> list[list[list[int]]]:
    """Return, of each optimizer and group, the places of its parameters."""
    places = {id(p): i for i, p in enumerate(opening.parameters)}
    return [[[places[id(p)] for p in group["params"]] for group in o.param_groups] for o in opening.optimizers]


# --- cuts, which travel at every validation: tensors and plain values, read without trust


def pack_cut(opening: Opening) -> bytes:
    """Return parameters and optimizer states of a shard as bytes that `torch.load` reads with ``weights_only``."""
    states = []
    for optimizer in opening.optimizers:
        places = {id(p): i for i, p in enumerate(opening.parameters)}
        of_places = {places[id(p)]: dict(state) for p, state in optimizer.state.items() if id(p) in places}
        states.append({"groups": get_groups(optimizer), "state": of_places, "whole": _whole(optimizer)})
    file = io.BytesIO()
    torch.save({"parameters": [p.detach() for p in opening.parameters], "optimizers": states}, file)
    return file.getvalue()


def _whole(optimizer: Optimizer) -> bytes | None:
    """Return an own ``state_dict`` of an optimizer that is not torch's; what it is made of is nobody's business."""
    return None if can_be_split([optimizer]) else dumps(optimizer.state_dict())


def unpack_cuts(
    cuts: Sequence[bytes], layout: Layout, order: Sequence[Sequence[Sequence[int]]], head: Snapshot
) -> Snapshot:
    """Return a cut of all shards, with what the head has of it (versions, buffers, epochs)."""
    found = [torch.load(io.BytesIO(cut), weights_only=True) for cut in cuts]
    parameters: list[Any] = [None] * sum(map(len, layout))
    states: list[dict[str, Any]] = []
    for places, part in zip(layout, found, strict=True):
        for place, value in zip(places, part["parameters"], strict=True):
            parameters[place] = value
    for which, groups in enumerate(order):
        first = found[0]["optimizers"][which]
        if first["whole"] is not None:
            states.append(pickle.loads(first["whole"]))
            continue
        state = {
            places[i]: values
            for places, part in zip(layout, found, strict=True)
            for i, values in part["optimizers"][which]["state"].items()
        }
        flat = [place for places in groups for place in places]
        numbers = {place: number for number, place in enumerate(flat)}
        param_groups = [
            {**values, "params": [numbers[place] for place in places]}
            for values, places in zip(first["groups"], groups, strict=True)
        ]
        states.append({"state": {numbers[p]: state[p] for p in flat if p in state}, "param_groups": param_groups})
    return replace(head, parameters=parameters, optimizer_states=states)
