"""Pushes and values as bytes that anybody may have sent: raw tensors, checked against what the run was opened with.

Nothing here runs what it reads: a message is a fixed header, a description in JSON and the bytes of tensors, whose
number, shapes and dtypes are not taken from the message but from the run. Whatever is not exactly as expected is a
`MalformedMessageError`, and the server goes on.
"""

import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.compression import Compression
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.leases import LeaseId
from lightning_accel.async_sgd.policy.pushes import OVERWRITE, Push

_HEADER = struct.Struct("!4sIQ")  # kind, bytes of the description, bytes of the tensors
_PUSH, _VALUES = b"LAp1", b"LAv1"
_MOST_LEASES = 1 << 16
_MOST_DESCRIPTION = 1 << 22
_MOST_NUMBER = 1 << 62


class MalformedMessageError(ValueError):
    """A message is not what the run was opened with; nothing of it was used."""


@dataclass(frozen=True)
class Registered:
    """What a run was opened with.

    Attributes:
        parameters: In order.
        buffers: In order.
        groups: Number of parameter groups of each optimizer.
        compression: Of gradients.
    """

    parameters: Sequence[TensorSpec]
    buffers: Sequence[TensorSpec]
    groups: Sequence[int]
    compression: Compression


# --- pushes


def encode_push(push: Push, payload: Sequence[Tensor]) -> bytes:
    """Return a push as bytes.

    Args:
        push: Its ``gradients`` say which parameters have one; their values are in ``payload``.
        payload: Encoded gradients (uint8, see `Compression.write`) of those parameters, in order.
    """
    description = {
        "worker": push.worker,
        "incarnation": push.incarnation,
        "sequence": push.sequence,
        "base_version": push.base_version,
        "optimizer": push.optimizer,
        "finite": push.finite,
        "present": [i for i, gradient in enumerate(push.gradients) if gradient is not None],
        "leases": [list(lease) for lease in push.leases],
        "groups": None if push.groups is None else [_plain_group(group) for group in push.groups],
        "buffers": bool(push.buffers),
        "base": bool(push.base),
        "pull_seconds": push.pull_seconds,
    }
    return _pack(_PUSH, description, [*payload, *map(_raw, push.buffers), *map(_raw, push.base)])


def decode_push(message: bytes, registered: Registered) -> Push:
    """Return the push that a message holds; its tensors are copies.

    Raises:
        MalformedMessageError: If it is none, or not of this run.
    """
    description, body = _unpack(_PUSH, message)
    said = _Fields(description, {"worker", "incarnation", "sequence", "base_version", "optimizer", "finite", "present",
                                 "leases", "groups", "buffers", "base", "pull_seconds"})  # fmt: skip
    optimizer = said.integer("optimizer", least=OVERWRITE, most=len(registered.groups) - 1)
    count = len(registered.parameters)
    present = said.integers("present", most=count - 1)
    if any(a >= b for a, b in itertools.pairwise(present)):
        raise MalformedMessageError("`present` must rise.")
    reader = _Reader(body)
    gradients: list[Tensor | None] = [None] * count
    for i in present:
        spec = registered.parameters[i]
        area = reader.take(registered.compression.nbytes(spec.shape.numel(), spec.dtype))
        gradients[i] = _decompressed(area, spec, registered.compression)
    buffers = [reader.tensor(spec) for spec in registered.buffers] if said.truth("buffers") else []
    base = [reader.tensor(spec) for spec in registered.parameters] if said.truth("base") else []
    reader.expect_end()
    finite = said.truth("finite") and all(bool(g.isfinite().all()) for g in gradients if g is not None)
    return Push(
        worker=said.integer("worker", most=_MOST_LEASES),
        incarnation=said.integer("incarnation"),
        sequence=said.integer("sequence", least=1),
        base_version=said.integer("base_version"),
        optimizer=optimizer,
        gradients=gradients,
        finite=finite,
        leases=said.leases(),
        groups=said.groups(registered.groups[optimizer] if optimizer >= 0 else None),
        buffers=buffers,
        base=base,
        pull_seconds=said.seconds("pull_seconds"),
    )


def _decompressed(area: Tensor, spec: TensorSpec, compression: Compression) -> Tensor:
    if compression.name == "topk":
        # places come first, as many as values; one outside of the tensor would be written out of bounds
        count = area.numel() // (8 + spec.dtype.itemsize)
        places = area[: 8 * count].view(torch.int64)
        if count and not bool(((places >= 0) & (places < spec.shape.numel())).all()):
            raise MalformedMessageError(f"a place of `{spec.name}` lies outside of it.")
    return compression.read(area, shape=spec.shape, dtype=spec.dtype)


# --- values: what a pull, a snapshot or a restore carries


def encode_values(values: Sequence[Tensor], *, version: int, steps: Sequence[int]) -> bytes:
    """Return tensors with the version that they belong to as bytes."""
    return _pack(_VALUES, {"version": version, "steps": list(steps)}, [_raw(value) for value in values])


def decode_values(
    message: bytes, specs: Sequence[TensorSpec], *, optimizers: int
) -> tuple[list[Tensor], int, list[int]]:
    """Return tensors of the given specs (copies), their version and the steps of each optimizer.

    Raises:
        MalformedMessageError: If the message does not hold exactly these.
    """
    description, body = _unpack(_VALUES, message)
    said = _Fields(description, {"version", "steps"})
    steps = said.integers("steps", most=_MOST_NUMBER)
    if len(steps) != optimizers:
        raise MalformedMessageError(f"steps of {len(steps)} optimizers, the run has {optimizers}.")
    reader = _Reader(body)
    values = [reader.tensor(spec) for spec in specs]
    reader.expect_end()
    return values, said.integer("version"), steps


# --- bytes


def _pack(kind: bytes, description: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
    text = json.dumps(description, allow_nan=False).encode()
    body = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return _HEADER.pack(kind, len(text), len(body)) + text + body


def _unpack(kind: bytes, message: bytes) -> tuple[Mapping[str, Any], memoryview]:
    view = memoryview(message)
    if len(view) < _HEADER.size:
        raise MalformedMessageError(f"{len(view)} bytes are no message.")
    found, description, body = _HEADER.unpack_from(view)
    if found != kind:
        raise MalformedMessageError(f"the message is of kind {found!r}, expected {kind!r}.")
    if description > _MOST_DESCRIPTION or len(view) != _HEADER.size + description + body:
        raise MalformedMessageError(f"the message has {len(view)} bytes, not as many as its header says.")
    text = bytes(view[_HEADER.size : _HEADER.size + description])
    try:
        said = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError("the description is no JSON.") from error
    if not isinstance(said, dict):
        raise MalformedMessageError("the description is no JSON object.")
    return said, view[_HEADER.size + description :]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON.")


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class _Reader:
    """Takes tensors of known sizes from the bytes of a message, one after another."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._place = 0

    def take(self, nbytes: int) -> Tensor:
        end = self._place + nbytes
        if end > len(self._body):
            raise MalformedMessageError(f"the message ends after {len(self._body)} bytes of tensors, {end} are due.")
        area = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            area.copy_(torch.frombuffer(bytearray(self._body[self._place : end]), dtype=torch.uint8))
        self._place = end
        return area

    def tensor(self, spec: TensorSpec) -> Tensor:
        area = self.take(spec.nbytes)
        if spec.dtype == torch.bool:
            return (area != 0).view(spec.shape)  # a byte that is neither 0 nor 1 is no truth value
        return area.view(spec.dtype).view(spec.shape)

    def expect_end(self) -> None:
        if self._place != len(self._body):
            raise MalformedMessageError(f"{len(self._body) - self._place} bytes are left over.")


# --- descriptions


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(name, value) for name, value in group.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"hyper-parameter `{name}` is a {type(value).__name__}, which has no form on the wire.")


class _Fields:
    """Reads a description whose fields must be these and of the right kinds."""

    def __init__(self, said: Mapping[str, Any], names: set[str]) -> None:
        if set(said) != names:
            raise MalformedMessageError(f"the description has other fields: {sorted(set(said) ^ names)[:5]}.")
        self._said = said

    def integer(self, name: str, *, least: int = 0, most: int = _MOST_NUMBER) -> int:
        return self._checked(name, self._said[name], least, most)

    def integers(self, name: str, *, most: int) -> list[int]:
        return [self._checked(name, value, 0, most) for value in self._list(name, self._said[name])]

    def truth(self, name: str) -> bool:
        value = self._said[name]
        if not isinstance(value, bool):
            raise MalformedMessageError(f"`{name}` must be true or false.")
        return value

    def seconds(self, name: str) -> float | None:
        value = self._said[name]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1e9:
            raise MalformedMessageError(f"`{name}` must be a number of seconds.")
        return float(value)

    def leases(self) -> list[LeaseId]:
        leases: list[LeaseId] = []
        for pair in self._list("leases", self._said["leases"]):
            epoch, position, *rest = [*self._list("leases", pair), None, None]
            if len(rest) != 2:
                raise MalformedMessageError("a lease is an epoch and a position.")
            most = _MOST_NUMBER
            leases.append((self._checked("leases", epoch, 0, most), self._checked("leases", position, 0, most)))
        return leases

    def groups(self, count: int | None) -> list[dict[str, Any]] | None:
        said = self._said["groups"]
        if said is None:
            return None
        groups = self._list("groups", said)
        if count is None or len(groups) != count:
            raise MalformedMessageError(f"{len(groups)} parameter groups, expected {count or 'none'}.")
        if not all(isinstance(group, dict) for group in groups):
            raise MalformedMessageError("a parameter group is an object.")
        return [{name: self._hyperparameter(name, value) for name, value in group.items()} for group in groups]

    def _hyperparameter(self, name: str, value: Any) -> Any:
        if name == "params":
            raise MalformedMessageError("a push does not name the parameters of a group.")
        if isinstance(value, list):
            return tuple(self._number_or_text(name, item) for item in value)  # as torch has them (betas)
        return self._number_or_text(name, value)

    def _number_or_text(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
            raise MalformedMessageError(f"hyper-parameter `{name}` must be a number, a text, true, false or null.")
        return value

    def _list(self, name: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > _MOST_LEASES:
            raise MalformedMessageError(f"`{name}` must be a list of at most {_MOST_LEASES} entries.")
        return value

    def _checked(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise MalformedMessageError(f"`{name}` must be a whole number in [{least}, {most}].")
        return value
