"""What a replica is made of: parts of parameters, and processes that count as one."""

import inspect
import logging

import pytest
import torch
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.async_sgd.replicas.processes import ReplicaProcess, make_places, start_ranks
from lightning_accel.async_sgd.replicas.shards import is_spread, local, part_of, put, whole
from lightning_accel.async_sgd.replicas.store import ReplicaStore


class Mesh:
    def __init__(self, sizes, ranks):
        self._sizes, self._ranks = sizes, ranks

    def size(self, dimension):
        return self._sizes[dimension]

    def get_local_rank(self, dimension):
        return self._ranks[dimension]


class Spread:
    """What a tensor over several processes shows of itself in one of them."""

    def __init__(self, value, placements, mesh):
        self.value, self.placements, self.device_mesh, self.shape = value, placements, mesh, value.shape
        self.mine = torch.zeros_like(value[part_of(self)])

    def full_tensor(self):
        return self.value

    def to_local(self):
        return self.mine


@pytest.mark.parametrize("length", [6, 5, 2, 1])
def test_parts_are_those_that_torch_shares_out(length):
    value = torch.arange(3.0 * length).view(length, 3)
    chunks = torch.chunk(value, 4)
    for rank in range(4):
        spread = Spread(value, (Replicate(), Shard(0)), Mesh((1, 4), (0, rank)))
        expected = chunks[rank] if rank < len(chunks) else value[:0]
        put(spread, value)
        assert torch.equal(local(spread), expected)
    columns = Spread(value, (Shard(1), Shard(0)), Mesh((3, 1), (2, 0)))
    assert part_of(columns) == (slice(0, length), slice(2, 3))


def test_processes_that_all_have_everything_are_spoken_of(caplog):
    class Silent:
        def __getattr__(self, name):
            return lambda *_: None

    store = ReplicaStore.__new__(ReplicaStore)
    store._leader, store._page, store._writer, store.ranks, store.worker = Silent(), Silent(), Silent(), Silent(), 3
    store.ranks.size = 2
    with caplog.at_level(logging.WARNING):
        store.check([torch.ones(2)], [])
    assert "each of the 2 processes of worker 3 has all of the parameters" in caplog.text


def test_what_is_whole_stays_whole():
    value = torch.ones(2, 2)
    assert not is_spread(value)
    assert whole(value) is local(value) is value
    assert part_of(value) is None
    copies = Spread.__new__(Spread)
    copies.placements, copies.shape = (Replicate(), Replicate()), value.shape
    assert part_of(copies) is None


def test_sums_that_are_not_made_yet_are_refused():
    pending = Spread.__new__(Spread)
    pending.placements, pending.shape = (Partial(),), (2, 2)
    with pytest.raises(ValueError, match="only `Shard` and `Replicate` can be served"):
        part_of(pending)


class Process:
    def __init__(self, pid, log):
        self.pid, self.exitcode, self._log = pid, None, log

    def kill(self):
        self._log.append(self.pid)
        self.exitcode = -9

    def join(self, timeout=None):
        assert timeout is None or timeout >= 0.0


def replica(size=3):
    log = []
    processes = [Process(pid, log) for pid in range(size)]
    return ReplicaProcess(processes), processes, log


def test_a_replica_lives_as_long_as_its_ranks_and_ends_as_its_leader():
    one, processes, log = replica()
    assert one.exitcode is None
    assert (one.pid, one.pids) == (0, [0, 1, 2])
    processes[1].exitcode = 0
    assert one.exitcode is None
    processes[0].exitcode = 0
    assert one.exitcode == 0
    one.join(1.0)
    assert log == []


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_where_one_rank_is_killed_all_are(killed):
    one, processes, log = replica()
    processes[killed].exitcode = -9
    assert one.exitcode == -9
    assert sorted(log) == [rank for rank in range(3) if rank != killed]


def test_the_leader_has_time_to_report_what_a_follower_raised():
    one, processes, log = replica()
    processes[2].exitcode = 1
    assert one.exitcode is None
    assert log == [], "nobody is killed yet"
    processes[0].exitcode = 1
    assert one.exitcode == 1
    assert log == [1]


def test_ranks_that_cannot_all_be_started_leave_none():
    log = []

    def start(rank, places):
        assert len(places) == 3
        if rank == 1:
            raise OSError("no more processes")
        return Process(rank, log)

    with pytest.raises(OSError, match="no more processes"):
        start_ranks(3, start)
    assert log == [0]


def test_ranks_meet_on_loopback_alone():
    leader, *followers = make_places(3)
    try:
        assert leader.listener.getsockname() == ("127.0.0.1", leader.port)
        assert [place.port for place in followers] == [leader.port] * 2
        leader.links[1].sendall(b"x")
        assert followers[1].links[0].recv(1) == b"x"
    finally:
        for place in (leader, *followers):
            place.close()


@pytest.mark.parametrize("name", sorted(name for name in vars(ParameterStore) if not name.startswith("_")))
def test_a_replica_has_what_the_protocol_of_stores_names(name):
    ours, theirs = getattr(ReplicaStore, name, None), getattr(ParameterStore, name)
    if inspect.isfunction(theirs):
        given, wanted = (inspect.signature(function).parameters.values() for function in (ours, theirs))
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted]
    else:
        assert ours is not None or name in {"worker", "incarnation", "settings"}, "an attribute of each store"
