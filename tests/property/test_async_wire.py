"""Messages of asynchronous SGD from anybody: whole and of this run, or refused, and the server goes on."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_accel.async_sgd import Compression, ParameterServer, Push, Settings
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.encoding.wire import (
    _HEADER,
    MalformedMessageError,
    Registered,
    decode_push,
    decode_values,
    encode_push,
    encode_values,
)
from lightning_accel.async_sgd.policy.stepping import get_groups
from lightning_accel.async_sgd.store import Opening

WEIGHT = TensorSpec("weight", torch.Size([2, 3]), torch.float32)
BIAS = TensorSpec("bias", torch.Size([2]), torch.bfloat16)
MASK = TensorSpec("mask", torch.Size([3]), torch.bool)
COUNT = TensorSpec("count", torch.Size([]), torch.int64)


def registered(name="none"):
    return Registered([WEIGHT, BIAS], [MASK, COUNT], [1], Compression(name, kept=0.5))


def sent(expected, *, gradients=None, **changes):
    gradients = [torch.arange(6.0).view(2, 3), None] if gradients is None else gradients
    payload = []
    for spec, gradient in zip(expected.parameters, gradients, strict=True):
        if gradient is not None:
            area = torch.empty(expected.compression.nbytes(gradient.numel(), spec.dtype), dtype=torch.uint8)
            expected.compression.write(gradient, area)
            payload.append(area)
    values = {
        "worker": 1,
        "incarnation": 0,
        "sequence": 1,
        "base_version": 0,
        "optimizer": 0,
        "gradients": gradients,
        "leases": [(0, 3), (1, 0)],
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "nesterov": False, "foreach": None}],
        "buffers": [torch.tensor([True, False, True]), torch.tensor(7)],
        "base": [torch.ones(2, 3), torch.ones(2, dtype=torch.bfloat16)],
        "pull_seconds": 0.25,
        **changes,
    }
    return encode_push(Push(**values), payload)


@pytest.mark.parametrize("name", ["none", "fp16", "int8", "topk"])
def test_a_push_arrives_as_it_was_sent(name):
    expected = registered(name)
    push = decode_push(sent(expected), expected)
    assert (push.worker, push.incarnation, push.sequence, push.base_version, push.optimizer) == (1, 0, 1, 0, 0)
    assert push.leases == [(0, 3), (1, 0)]
    assert push.groups == [{"lr": 0.1, "betas": (0.9, 0.99), "nesterov": False, "foreach": None}]
    assert push.finite
    assert push.pull_seconds == 0.25
    assert push.gradients[1] is None
    if name == "none":
        assert torch.equal(push.gradients[0], torch.arange(6.0).view(2, 3))
    assert push.gradients[0].shape == (2, 3)
    assert [b.tolist() for b in push.buffers] == [[True, False, True], 7]
    assert [b.dtype for b in push.base] == [torch.float32, torch.bfloat16]
    assert all(bool((b == 1).all()) for b in push.base)


def test_the_receiver_sees_for_itself_whether_gradients_are_finite():
    expected = registered()
    bad = torch.full((2, 3), math.nan)
    assert not decode_push(sent(expected, gradients=[bad, None], finite=True), expected).finite


def test_values_arrive_as_they_were_sent():
    specs = [WEIGHT, MASK, COUNT]
    values = [torch.randn(2, 3), torch.tensor([True, True, False]), torch.tensor(3)]
    message = encode_values(values, version=9, steps=[4, 5])
    got, version, steps = decode_values(message, specs, optimizers=2)
    assert (version, steps) == (9, [4, 5])
    assert all(torch.equal(a, b) for a, b in zip(values, got, strict=True))
    with pytest.raises(MalformedMessageError, match="steps of 2 optimizers, the run has 1"):
        decode_values(message, specs, optimizers=1)
    with pytest.raises(MalformedMessageError, match="bytes are left over"):
        decode_values(message, specs[:2], optimizers=2)
    with pytest.raises(MalformedMessageError, match="the message ends after"):
        decode_values(message, [*specs, WEIGHT], optimizers=2)
    with pytest.raises(MalformedMessageError, match=r"the message is of kind b'LAv1', expected b'LAp1'"):
        decode_push(message, registered())


def test_a_byte_that_is_no_truth_value_is_made_one():
    message = bytearray(encode_values([torch.tensor([True, False, True])], version=0, steps=[]))
    message[-2] = 255
    (mask,), _, _ = decode_values(bytes(message), [MASK], optimizers=0)
    assert mask.tolist() == [True, True, True]


def edited(message, **changes):
    """The message with other fields in its description, its lengths put right."""
    kind, length, body = _HEADER.unpack_from(message)
    said = json.loads(message[_HEADER.size : _HEADER.size + length])
    said.update({name: value for name, value in changes.items() if value is not ...})
    for name in [name for name, value in changes.items() if value is ...]:
        del said[name]
    text = json.dumps(said).encode()
    return _HEADER.pack(kind, len(text), body) + text + message[_HEADER.size + length :]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"worker": -1}, "`worker` must be a whole number in"),
        ({"worker": True}, "`worker` must be a whole number in"),
        ({"sequence": 0}, "`sequence` must be a whole number in"),
        ({"base_version": 1 << 63}, "`base_version` must be a whole number in"),
        ({"optimizer": 1}, "`optimizer` must be a whole number in"),
        ({"optimizer": -5}, "`optimizer` must be a whole number in"),
        ({"optimizer": "0"}, "`optimizer` must be a whole number in"),
        ({"present": [2]}, "`present` must be a whole number in"),
        ({"present": [0, 0]}, "`present` must rise"),
        ({"present": []}, "bytes are left over"),
        ({"present": [0, 1]}, "the message ends after"),
        ({"finite": 1}, "`finite` must be true or false"),
        ({"leases": [[0]]}, "`leases` must be a whole number|a lease is an epoch and a position"),
        ({"leases": [[0, 1, 2]]}, "a lease is an epoch and a position"),
        ({"leases": {"0": 1}}, "`leases` must be a list"),
        ({"groups": []}, "0 parameter groups, expected 1"),
        ({"groups": [3]}, "a parameter group is an object"),
        ({"groups": [{"params": []}]}, "does not name the parameters"),
        ({"groups": [{"lr": {"a": 1}}]}, "hyper-parameter `lr` must be a number"),
        ({"groups": [{"betas": [[0.9]]}]}, "hyper-parameter `betas` must be a number"),
        ({"optimizer": -2}, "1 parameter groups, expected none"),
        ({"pull_seconds": -1.0}, "`pull_seconds` must be a number of seconds"),
        ({"pull_seconds": ...}, "the description has other fields: .*pull_seconds"),
        ({"more": 1}, "the description has other fields: .*more"),
    ],
    ids=str,
)
def test_a_description_that_is_not_as_expected_is_refused(changes, match):
    expected = registered()
    with pytest.raises(MalformedMessageError, match=match):
        decode_push(edited(sent(expected), **changes), expected)


def test_an_oversized_description_and_nested_or_endless_numbers_are_refused():
    expected = registered()

    def with_text(text):
        return _HEADER.pack(b"LAp1", len(text), 0) + text

    for text in (b"[" * 100_000, b"{}" + b" " * (1 << 22), b'{"a": NaN}', b"[1]", b"\xff", b"9" * 5000):
        with pytest.raises(MalformedMessageError):
            decode_push(with_text(text), expected)
    message = edited(sent(expected), groups=[{"lr": "RATE"}]).replace(b'"RATE"', b"1e9999")
    with pytest.raises(MalformedMessageError, match="hyper-parameter `lr` must be a number"):
        decode_push(message, expected)


def test_places_of_a_sparse_gradient_outside_of_it_are_refused():
    expected = registered("topk")
    message = bytearray(sent(expected, buffers=[], base=[]))
    message[-3 * 12 : -3 * 12 + 8] = (6).to_bytes(8, "little")  # three places, then three values
    with pytest.raises(MalformedMessageError, match="a place of `weight` lies outside of it"):
        decode_push(bytes(message), expected)


def test_a_hyperparameter_without_a_plain_form_is_refused_where_it_is_sent():
    with pytest.raises(TypeError, match=r"hyper-parameter `lr` is a object, which has no form on the wire"):
        sent(registered(), groups=[{"lr": object()}])
    expected = registered()
    assert decode_push(sent(expected, groups=[{"lr": torch.tensor(0.5)}]), expected).groups == [{"lr": 0.5}]


class Server:
    """Takes messages as a server on a network would."""

    def __init__(self):
        self.weight = nn.Parameter(torch.zeros(2, 3))
        optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.server = ParameterServer(Opening(["weight"], [self.weight], [], [], [optimizer]), Settings())
        self.server.admit(0, 0)
        self.registered = Registered([WEIGHT], [], [1], Compression())
        self.groups = get_groups(optimizer)
        self.sequence = 0

    def receive(self, message):
        try:
            push = decode_push(message, self.registered)
        except MalformedMessageError:
            return "malformed"
        return self.server.apply(push)

    def message(self):
        self.sequence += 1
        values = {"worker": 0, "sequence": self.sequence, "leases": [], "groups": self.groups, "buffers": []}
        base = {"base_version": self.server.version, "base": []}
        return sent(self.registered, gradients=[torch.ones(2, 3)], **values, **base)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    expected = registered()
    with pytest.raises(MalformedMessageError):
        decode_push(data, expected)
    with pytest.raises(MalformedMessageError):
        decode_values(data, [WEIGHT], optimizers=1)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6), cut=st.integers(0, 40)
)
def test_the_server_outlives_messages_that_were_changed_on_the_way(edits, cut):
    server = Server()
    assert server.receive(server.message()) == "applied"
    changed = bytearray(server.message())
    server.sequence -= 1
    for place, value in edits:
        changed[place % len(changed)] = value
    outcome = server.receive(bytes(changed[: len(changed) - cut]))
    assert outcome in ("malformed", "applied", "dropped", "refused", "committed", "assigned")
    if outcome in ("malformed", "refused"):
        assert torch.allclose(server.weight.detach(), torch.full((2, 3), -0.1)), "untouched"
    if outcome in ("malformed", "refused"):
        good = server.message()
        assert server.receive(good) == "applied"
        assert server.receive(good) == "refused", "a replay"
