"""Requests and answers between workers and the head of a run: JSON and raw bytes, checked, never pickle.

Nothing here runs what it reads. A message names its kind; the fields of each kind, and what they hold, are fixed.
"""

import json
import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.encoding.wire import MalformedMessageError
from lightning_accel.async_sgd.policy.leases import Lease, LeaseId
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.store import Statistics

_HEADER = struct.Struct("!4sIQ")  # magic, bytes of the text, bytes of the payload
_MAGIC = b"LAr1"
_MOST_TEXT = 1 << 26
_TAG = "\0kind"
_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# field: type (a tuple where None is allowed, too); what is not listed has no form on the wire
_REQUESTS: dict[str, dict[str, Any]] = {
    "hello": {"node": str, "pid": int},
    "join": {},
    "lease": {"epoch": int, "final": bool, "known": int, "complete": bool, "units": (list, type(None))},
    "slack": {},
    "kv": {"key": str, "write": bool, "replace": bool, "wait": bool},
    "commit": {"leases": list},
    "give back": {"leases": list},
    "idle": {"idle": bool},
    "read": {},
    "snapshot": {},
    "hold": {},
    "let go": {},
    "restore": {},
    "exchange": {},
    "rejoin": {},
    "statistics": {},
    "finish": {},
    "stop": {"complete": bool},
    "leave": {"stop": bool},
    "result": {},
    "deliver": {},
    "failed": {"traceback": str},
    "push": {
        "sequence": int,
        "base_version": int,
        "optimizer": int,
        "finite": bool,
        "present": bool,
        "void": bool,
        "read": bool,
        "buffers": bool,
        "leases": list,
        "groups": (list, type(None)),
        "pull_seconds": (float, type(None)),
    },
}


def pack_request(message: Message) -> bytes:
    """Return a request as bytes."""
    return _pack(message.kind, message.values, message.payload)


def unpack_request(data: bytes) -> Message:
    """Return the request that ``data`` holds.

    Raises:
        MalformedMessageError: If it is none, or not as its kind wants it.
    """
    message = _unpack(data)
    fields = _REQUESTS.get(message.kind)
    if fields is None:
        raise MalformedMessageError(f"there is no request of kind {message.kind[:40]!r}.")
    if set(message.values) != set(fields):
        raise MalformedMessageError(f"a request of kind `{message.kind}` has the fields {sorted(fields)}.")
    for name, kind in fields.items():
        value = message.values[name]
        exact = type(value) in kind if isinstance(kind, tuple) else type(value) is kind
        if not exact or (kind is int and not -8 < value < 1 << 62):
            raise MalformedMessageError(f"`{name}` of a request `{message.kind}` must be {kind}.")
    if "leases" in fields:
        message.values["leases"] = [_lease_id(pair) for pair in message.values["leases"]]
    return message


def pack_answer(message: Message) -> bytes:
    """Return an answer as bytes; leases, specs and statistics are among what its values may be."""
    values = dict(message.values)
    if "leases" in values:
        values["leases"] = [[*lease.id, lease.unit] for lease in values["leases"]]
    for specs in values.keys() & {"specs", "buffer_specs"}:
        values[specs] = [[s.name, list(s.shape), str(s.dtype)] for s in values[specs]]
    if "statistics" in values:
        values["statistics"] = asdict(values["statistics"])
    return _pack(message.kind, values, message.payload)


def unpack_answer(data: bytes) -> Message:
    """Return the answer that ``data`` holds.

    Raises:
        MalformedMessageError: If it is none.
    """
    message = _unpack(data)
    values = message.values
    try:
        if "leases" in values:
            values["leases"] = [Lease(epoch, position, unit) for epoch, position, unit in values["leases"]]
        for specs in values.keys() & {"specs", "buffer_specs"}:
            values[specs] = [_spec(*spec) for spec in values[specs]]
        if "statistics" in values:
            values["statistics"] = Statistics(**values["statistics"])
    except (TypeError, ValueError) as error:
        raise MalformedMessageError(f"an answer of kind `{message.kind}` is not as it must be.") from error
    return message


def _spec(name: str, shape: list[int], dtype: str) -> TensorSpec:
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype} is no dtype.")
    return TensorSpec(name, torch.Size(shape), found)


def _lease_id(pair: Any) -> LeaseId:
    numbers = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
    if not numbers:
        raise MalformedMessageError("a lease is an epoch and a position.")
    return pair[0], pair[1]


# --- plain values


def to_plain(value: Any) -> Any:
    """Return a value as JSON has it, tagged where JSON has no such thing.

    Numbers, texts, truth values, None, lists, tuples, dictionaries and tensors of one element can go.

    Raises:
        TypeError: For anything else.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_TAG: "float", "value": str(float(value))}
    if isinstance(value, (list, tuple)):
        plain = [to_plain(item) for item in value]
        return plain if type(value) is list else {_TAG: "tuple", "value": plain}
    if isinstance(value, Tensor) and value.numel() == 1:
        kept = {"dtype": str(value.dtype), "shape": list(value.shape)}
        return {_TAG: "tensor", "value": to_plain(value.detach().cpu().item()), **kept}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_TAG: "dict", "value": [[key, to_plain(item)] for key, item in value.items()]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy
        return to_plain(value.item())
    raise TypeError(f"a {type(value).__name__} has no form on the wire.")


def from_plain(value: Any) -> Any:
    """Return what `to_plain` was given.

    Raises:
        MalformedMessageError: For what it never makes.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    inner: Any = value.get("value")
    kind = value.get(_TAG)
    try:
        if kind == "tuple":
            return tuple(from_plain(item) for item in inner)
        if kind == "float":
            return _NUMBERS[inner]
        if kind == "dict":
            return {str(key): from_plain(item) for key, item in inner}
        if kind == "tensor":
            spec = _spec("", value["shape"], value["dtype"])
            return torch.tensor(from_plain(inner), dtype=spec.dtype).reshape(spec.shape)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise MalformedMessageError("a tagged value is not as it must be.") from error
    raise MalformedMessageError("a value has an unknown tag.")


# --- bytes


def _pack(kind: str, values: Mapping[str, Any], payload: bytes) -> bytes:
    plain = {"kind": kind, "values": {name: to_plain(value) for name, value in values.items()}}
    text = json.dumps(plain, allow_nan=False).encode()
    return _HEADER.pack(_MAGIC, len(text), len(payload)) + text + payload


def _unpack(data: bytes) -> Message:
    if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) < _HEADER.size:
        raise MalformedMessageError("this is no message.")
    view = memoryview(data)
    magic, text, payload = _HEADER.unpack_from(view)
    if magic != _MAGIC or text > _MOST_TEXT or len(view) != _HEADER.size + text + payload:
        raise MalformedMessageError(f"{len(view)} bytes that are no message.")
    try:
        found = json.loads(bytes(view[_HEADER.size : _HEADER.size + text]), parse_constant=_refuse_constant)
        kind, values = found["kind"], found["values"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedMessageError("the text of a message is not as it must be.") from error
    if not isinstance(kind, str) or not isinstance(values, dict):
        raise MalformedMessageError("a message has a kind and values.")
    return Message(kind, {n: from_plain(v) for n, v in values.items()}, bytes(view[_HEADER.size + text :]))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON.")


def pack_exception(exception: BaseException) -> bytes:
    """Return an exception as bytes for the caller of the run; nothing if it cannot be packed."""
    try:
        return pickle.dumps(exception)
    except Exception:  # anything may hang on an exception
        return b""
