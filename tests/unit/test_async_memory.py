"""Shared memory and sockets of asynchronous SGD: whole or not at all, never waiting, nothing left."""

import os
import pickle
import socket
import threading

import pytest
import torch

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.shared_memory.channel import Channel, ChannelClosedError, Message
from lightning_accel.async_sgd.shared_memory.control import ControlPage
from lightning_accel.async_sgd.shared_memory.memory import Mailbox, ParameterPage, Segment
from lightning_accel.async_sgd.shared_memory.pushing import is_finite

SPECS = [TensorSpec("w", torch.Size([3, 5]), torch.float32), TensorSpec("n", torch.Size([]), torch.int64)]


def duplicate(segment):
    return os.dup(segment.fd)


def test_a_segment_is_shared_by_its_descriptor_and_has_no_name():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    one = Segment(128)
    other = Segment(128, duplicate(one))
    one.bytes[5] = 7
    assert int(other.bytes[5]) == 7
    assert not before or set(os.listdir("/dev/shm")) <= before
    one.close()
    one.close()
    other.close()
    assert int(other.bytes[5]) == 7  # the memory outlives the descriptors


def test_a_segment_works_without_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    one = Segment(64)
    other = Segment(64, duplicate(one))
    other.bytes[0] = 3
    assert int(one.bytes[0]) == 3
    one.close()
    other.close()


def test_readers_see_one_publication_with_its_version():
    writer = ParameterPage(SPECS, 1)
    reader = ParameterPage(SPECS, 1, duplicate(writer.segment))
    writer.publish([torch.ones(3, 5), torch.tensor(4)], 7, [6])
    weight, count = torch.zeros(3, 5), torch.tensor(0)
    assert reader.read_into([weight, count]) == (7, [6])
    assert weight.eq(1.0).all()
    assert int(count) == 4
    assert reader.read_into([None, count]) == (7, [6])


def test_readers_never_see_half_a_publication():
    specs = [TensorSpec("w", torch.Size([20_000]), torch.float32)]
    writer = ParameterPage(specs, 1)
    writer.publish([torch.zeros(20_000)], 0, [0])
    reader = ParameterPage(specs, 1, duplicate(writer.segment))
    done = threading.Event()

    def write():
        for version in range(1, 1500):
            writer.publish([torch.full((20_000,), float(version))], version, [version])
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    target = torch.empty(20_000)
    versions = []
    while not done.is_set():
        version, counters = reader.read_into([target])
        assert counters == [version]
        assert target.eq(float(version)).all()
        versions.append(version)
    thread.join()
    assert versions == sorted(versions)


def test_a_push_is_there_only_once_its_number_is():
    writer = Mailbox([8], 4096)
    reader = Mailbox([8], 4096, duplicate(writer.segment))
    stages = []
    assert reader.committed(1) is None
    with writer.writing(1, {"base": 3}, stages.append) as areas:
        areas[0].fill_(9)
        assert reader.committed(1) is None
    meta, areas = reader.committed(1)
    assert meta == {"base": 3}
    assert areas[0].tolist() == [9] * 8
    assert stages == ["before the flag"]
    with writer.writing(2, {}, stages.append):
        assert reader.committed(1) is not None  # the other slot
    with writer.writing(3, {}, stages.append):
        assert reader.committed(1) is None
    assert reader.committed(2) is not None


def test_the_payload_of_a_push_can_be_seen_as_one_piece():
    mailbox = Mailbox([12, 8], 64)
    with mailbox.writing(1, {}, lambda _: None) as areas:
        areas[0].view(torch.float32).copy_(torch.tensor([1.0, 2.0, 3.0]))
        areas[1].view(torch.float32).copy_(torch.tensor([4.0, 5.0]))
    assert float(mailbox.span(1, 2).view(torch.float32).sum()) == 15.0
    assert float(mailbox.span(1, 1).view(torch.float32).sum()) == 6.0
    assert float(mailbox.span(2, 2).view(torch.float32).sum()) == 0.0  # the other slot


def test_a_worker_learns_from_the_page_what_became_of_its_push():
    server = ControlPage(3)
    worker = ControlPage(3, duplicate(server.segment))
    assert worker.acknowledged(1) == (0, "applied")
    assert not server.acknowledge(1, 7, "refused")
    assert worker.acknowledged(1) == (7, "refused")
    assert worker.acknowledged(0) == worker.acknowledged(2) == (0, "applied")
    worker.wait(1, waiting=True)
    assert server.acknowledge(1, 8, "assigned")  # whoever sleeps has to be woken up
    worker.beat(1)
    server.clear(1)
    assert worker.acknowledged(1) == (0, "applied")
    assert not server.is_waiting(1)
    assert server.heartbeat(1) == 1
    server.coordinator, server.live = 2, 3
    assert (worker.coordinator, worker.live, worker.stopped) == (2, 3, False)
    server.stop()
    assert worker.stopped
    worker.close()
    server.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_found(value, place):
    tensors = [torch.ones(3, 5), torch.ones(7, dtype=torch.bfloat16)]
    assert is_finite(tensors)
    tensors[place][-1] = value
    assert not is_finite(tensors)


def test_large_elements_are_finite_although_their_norm_is_not():
    assert is_finite([torch.full((4,), 3e38)])
    assert is_finite([])
    assert is_finite([torch.empty(0)])


def test_a_description_that_does_not_fit_is_refused_and_nothing_is_committed():
    mailbox = Mailbox([8], 64)
    with (
        pytest.raises(ValueError, match=r"the mailbox has room for 64"),
        mailbox.writing(1, {"groups": "x" * 100}, lambda _: None),
    ):
        pass
    assert mailbox.committed(1) is None


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    channels = Channel(one), Channel(other)
    yield channels
    for channel in channels:
        channel.close()


def test_messages_arrive_in_order_with_payload_and_descriptors(ends):
    server, worker = ends
    segment = Segment(64)
    segment.bytes[1] = 5
    server.send(Message("a", {"x": 1}))
    server.send(Message("b", payload=b"raw", descriptors=[segment.fd]))
    found = []
    while len(found) < 2:
        found += worker.wait()
    assert [m.kind for m in found] == ["a", "b"]
    assert found[0].values == {"x": 1}
    assert found[1].payload == b"raw"
    assert int(Segment(64, found[1].descriptors[0]).bytes[1]) == 5


def test_a_large_message_does_not_block_a_server_whose_peer_does_not_read(ends):
    server, worker = ends
    payload = bytes(range(256)) * 40_000  # ten megabytes: more than any socket buffers
    server.send(Message("big", payload=payload))
    assert not server.flush(wait=False)
    received = []
    thread = threading.Thread(target=lambda: received.extend(worker.wait()))
    thread.start()
    server.flush(wait=True)
    thread.join(30)
    assert received[0].payload == payload


def test_a_ring_is_a_message_among_others(ends):
    server, worker = ends
    worker.ring()
    worker.send(Message("lease"))
    worker.ring()
    assert [m.kind for m in server.wait()] == ["bell", "lease", "bell"]


def test_half_a_message_of_a_dead_peer_is_no_message(ends):
    server, worker = ends
    whole = pickle.dumps(("lease", {}, b"x" * 1000))
    worker._socket.sendall(len(whole).to_bytes(8, "big") + (0).to_bytes(8, "big") + whole[:100])
    assert server.poll() == []
    worker.close()
    with pytest.raises(ChannelClosedError, match="the other end of the channel is gone"):
        server.poll()


def test_a_closed_channel_says_so(ends):
    server, worker = ends
    worker.close()
    with pytest.raises(ChannelClosedError, match="the other end of the channel is gone"):
        server.wait()
    with pytest.raises(ChannelClosedError, match="the other end of the channel is gone"):
        server.send(Message("too late"))
