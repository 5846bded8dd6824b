"""Copies of optimizers with all that they are made of, over other parameters.

`torch.optim.Optimizer` pickles and deep-copies its state and its groups alone: attributes of a subclass and optimizers
inside optimizers get lost, and their first step on the server would fail, or be another one.
"""

import copyreg
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_NOT_COPIED = ("step", "_profile_hook_step")  # what a schedule, or a worker, has put on the instance
_HOOKS = "_hooks"  # end of the names under which torch keeps hooks: a user's run in the workers


def copy_optimizers(optimizers: Sequence[Optimizer], parameters: Mapping[int, Tensor]) -> list[Optimizer]:
    """Return copies over other parameters, with their state.

    Args:
        optimizers: To copy.
        parameters: What stands for each parameter in the copy, by the ``id`` of the original.

    Raises:
        ValueError: If an optimizer holds what cannot be pickled; says which attribute.
    """
    names = {key: str(place) for place, key in enumerate(parameters)}
    places = {str(place): value for place, value in enumerate(parameters.values())}
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, lambda value: names.get(id(value)))
    try:
        pickler.dump(list(optimizers))
    except Exception as error:
        raise ValueError(_what_cannot_go(optimizers, names, error)) from error
    unpickler = _Unpickler(io.BytesIO(buffer.getvalue()), places)
    copies: list[Optimizer] = unpickler.load()
    return copies


def dumps(value: Any) -> bytes:
    """Pickle a value in which there are optimizers, whole."""
    buffer = io.BytesIO()
    _Pickler(buffer, lambda _: None).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, name_of: Callable[[Any], str | None]) -> None:
        super().__init__(file)
        self._name_of = name_of

    def persistent_id(self, obj: Any) -> str | None:
        return self._name_of(obj) if isinstance(obj, Tensor) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Optimizer) or type(obj).__getstate__ is not Optimizer.__getstate__:
            return NotImplemented
        return copyreg.__newobj__, (type(obj),), _attributes(obj)  # type: ignore[attr-defined]  # pickle's own way


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(file)
        self._parameters = parameters

    def persistent_load(self, pid: str) -> Tensor:
        return self._parameters[pid]


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    return {k: v for k, v in vars(optimizer).items() if k not in _NOT_COPIED and not k.endswith(_HOOKS)}


def _what_cannot_go(optimizers: Sequence[Optimizer], names: Mapping[int, str], error: Exception) -> str:
    for optimizer in optimizers:
        for attribute, value in _attributes(optimizer).items():
            try:
                _Pickler(io.BytesIO(), lambda v: names.get(id(v))).dump(value)
            except Exception:  # noqa: PERF203  # anything may hang on an attribute
                return (
                    f"`{type(optimizer).__name__}.{attribute}` ({type(value).__name__}) cannot be pickled, and the "
                    "optimizer steps in another process; make it a plain value or a function of a module."
                )
    return (
        f"{type(optimizers[0]).__name__ if optimizers else 'the optimizer'} cannot be pickled ({error}), and it steps "
        "in another process; define its class in a module."
    )


def refuse_what_needs_a_loss(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step is another one without a closure: the server has gradients, and no loss.

    Tried on copies of parameters, with random gradients; neither the optimizer nor a random state is changed.

    Raises:
        ValueError: If it fails without a closure, calls one more than once, or makes other parameters with one.
    """
    name = type(optimizer).__name__
    own = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(0)
    gradients = [1e-3 * torch.randn(p.shape, generator=generator).to(p) for p in own]
    found: list[list[Tensor]] = []
    calls = 0

    def loss() -> Any:
        nonlocal calls
        calls += 1
        return torch.zeros(())

    for closure in (None, loss):
        copies = {id(p): torch.nn.Parameter(p.detach().clone()) for p in own}
        (twin,) = copy_optimizers([optimizer], copies)
        for parameter, gradient in zip(copies.values(), gradients, strict=True):
            parameter.grad = gradient.clone()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                twin.step() if closure is None else twin.step(closure)
        except Exception as error:
            if closure is not None:
                return  # it takes none
            raise ValueError(
                f"`{name}.step()` fails without a closure ({type(error).__name__}: {error}), and a parameter server "
                "has gradients alone; use an optimizer whose `step()` needs no loss, or another strategy."
            ) from error
        found.append([p.detach() for p in copies.values()])
    same = all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(*found, strict=True))
    if calls > 1 or not same:
        uses = f"evaluates the loss {calls} times in" if calls > 1 else "uses the loss in"
        raise ValueError(
            f"`{name}` {uses} one step, and a parameter server has gradients alone; use an optimizer whose `step()` "
            "needs no loss, or another strategy."
        )
