"""Modules that are run for a look and must be afterwards what they were."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def copy_module(model: nn.Module) -> nn.Module:
    """Return a deep copy; also of modules that hold tensors computed from their parameters, as old weight norm does.

    What can not be copied at all, such as a lock or an open file, both hold.
    """
    values = [value for module in model.modules() for value in module.__dict__.values()]
    memo: dict[int, Any] = {}
    for value in values:
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError):
        return copy.deepcopy(model, memo | {id(value): value for value in values if not _can_be_copied(value, memo)})


@contextlib.contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass changes: buffers, attributes, and the random state, which is the same each time."""
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # those have no such state
    before = [(m, _attributes(m), dict(m._buffers)) for m in plain]
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


def _can_be_copied(value: object, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except (TypeError, RuntimeError):
        return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))
