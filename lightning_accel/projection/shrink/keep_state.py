"""Modules that are run for a look and must be afterwards what they were."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def copy_module(model: nn.Module) -> nn.Module:
    """Return a deep copy; also of modules that hold tensors computed from their parameters, as old weight norm does."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass changes: buffers, attributes, and the random state, which is the same each time."""
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    before = [(m, _attributes(m), dict(m._buffers)) for m in model.modules()]
    values = {id(b): b.clone() for b in model.buffers()}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for module, attributes, buffers in before:
                module.__dict__.update(attributes)
                for name in set(module.__dict__) - set(attributes):
                    del module.__dict__[name]
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer in model.buffers():
                if id(buffer) in values and not _equal(buffer, values[id(buffer)]):
                    buffer.data.copy_(values[id(buffer)])


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes; lists, dicts and sets of the user's as copies, for a forward pass may add to them."""
    return {
        name: copy.copy(value) if type(value) in (list, dict, set) and not name.startswith("_") else value
        for name, value in module.__dict__.items()
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))
