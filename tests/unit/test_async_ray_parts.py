"""Parts of the engine for clusters that need no Ray: messages, pieces of parameters, one shard, what is refused."""

import asyncio
import importlib.util
import io
import math
import pickle
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import Compression, Lease, ParameterServer, Push, Settings, Statistics
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.encoding.wire import MalformedMessageError, encode_push
from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers, dumps
from lightning_accel.async_sgd.policy.pushes import OUTER
from lightning_accel.async_sgd.ray_engine.cluster import refuse_without_token
from lightning_accel.async_sgd.ray_engine.messages import (
    from_plain,
    pack_answer,
    pack_request,
    to_plain,
    unpack_answer,
    unpack_request,
)
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.peers import ActorProcess
from lightning_accel.async_sgd.ray_engine.shards.group import ShardGroup
from lightning_accel.async_sgd.ray_engine.shards.layout import (
    can_be_split,
    merge,
    pack_cut,
    places_of_groups,
    share_out,
    split,
    unpack_cuts,
)
from lightning_accel.async_sgd.ray_engine.shards.server import ShardedServer
from lightning_accel.async_sgd.ray_engine.shards.shard import Shard, Step
from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.store import Opening, Snapshot
from lightning_accel.strategies.engines import refuse_replicas_elsewhere

# --- messages


def test_a_request_and_an_answer_come_out_as_they_went_in():
    request = Message("lease", {"epoch": 1, "final": False, "known": 0, "complete": True, "units": [[1, 2], (3, "a")]})
    back = unpack_request(pack_request(request))
    assert (back.kind, back.values, back.payload) == ("lease", request.values, b"")
    specs = [TensorSpec("weight", torch.Size([2, 3]), torch.float64)]
    values = {
        "leases": [Lease(0, 3, (1, 2))],
        "specs": specs,
        "statistics": Statistics(version=3, worker_pushes=(1, 2)),
    }
    answer = unpack_answer(pack_answer(Message("any", dict(values), b"bytes")))
    assert answer.values == values
    assert answer.payload == b"bytes"


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.5, math.inf, "a", [1, [2]], (1, (2,)), {"lr": 0.1, "betas": (0.9, 0.99)}], ids=str
)
def test_plain_values_are_the_same_after_the_way(value):
    back = from_plain(to_plain(value))
    assert back == value
    assert type(back) is type(value)


def test_a_rate_that_is_a_tensor_stays_one():
    back = from_plain(to_plain(torch.tensor(0.1)))
    assert torch.equal(back, torch.tensor(0.1))
    with pytest.raises(TypeError, match="a Tensor has no form on the wire"):
        to_plain(torch.zeros(3))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_request(data):
    with pytest.raises(MalformedMessageError):
        unpack_request(data)
    with pytest.raises(MalformedMessageError):
        unpack_request(b"LAr1" + data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_request_with_a_changed_byte_is_refused_or_another_valid_one(data):
    good = bytearray(pack_request(Message("commit", {"leases": [(0, 1), (0, 2)]})))
    good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = unpack_request(bytes(good))
    except MalformedMessageError:
        return
    assert found.kind == "commit"
    assert all(epoch >= 0 and position >= 0 for epoch, position in found.values["leases"])


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        ("open the door", {}, "no request of kind"),
        ("idle", {}, "has the fields"),
        ("idle", {"idle": 1}, "`idle` of a request"),
        ("commit", {"leases": [(0, -1)]}, "a lease is an epoch and a position"),
        ("kv", {"key": 3, "write": True, "replace": False, "wait": True}, "`key`"),
    ],
)
def test_requests_are_checked(kind, values, match):
    with pytest.raises(MalformedMessageError, match=match):
        unpack_request(pack_request(Message(kind, values)))


def test_pickle_is_no_request():
    with pytest.raises(MalformedMessageError, match="no message"):
        unpack_request(pickle.dumps(Message("idle", {"idle": True})))


# --- pieces


def opening(kind="adamw", steps=3):
    """Four parameters in two groups, an optimizer that has stepped."""
    torch.manual_seed(2)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4,), (2, 4), (2,))]
    groups = [{"params": parameters[2:]}, {"params": parameters[:2], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.1) if kind == "adamw" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return Opening(["a", "b", "c", "d"], parameters, [], [], [optimizer])


def test_parameters_are_shared_out_by_their_bytes():
    tensors = [torch.zeros(n) for n in (100, 1, 50, 50, 1)]
    assert share_out(tensors, 2) == [[0, 4], [1, 2, 3]] or share_out(tensors, 2) == [[0, 1], [2, 3, 4]]
    assert share_out(tensors, 1) == [[0, 1, 2, 3, 4]]
    assert sorted(map(len, share_out(tensors, 99))) == [1] * 5


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_pieces_put_together_are_the_whole(kind, shards):
    whole = opening(kind)
    expected = pickle.loads(pickle.dumps(whole.optimizers[0].state_dict()))
    layout, order = share_out(whole.parameters, shards), places_of_groups(whole)
    parts = [pickle.loads(dumps(part)) for part in split(whole, layout)]
    cut = unpack_cuts([pack_cut(part) for part in parts], layout, order, Snapshot(3, [3], [], [], [], []))
    again = merge(parts, layout, order)
    for found in (cut.optimizer_states[0], again.optimizers[0].state_dict()):
        assert found["param_groups"] == expected["param_groups"]
        assert found["state"].keys() == expected["state"].keys()
        for place, state in expected["state"].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(found["state"][place][k])) for k, v in state.items()
            )
    for parameters in (cut.parameters, again.parameters):
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters, parameters, strict=True))


class _OneRateForAll(torch.optim.SGD):
    """An optimizer of somebody else's."""


def test_an_optimizer_that_nobody_knows_is_not_split():
    whole = opening("sgd")
    assert can_be_split(whole.optimizers)
    assert not can_be_split([_OneRateForAll(whole.parameters, lr=0.1)])


# --- one shard


def push_bytes(gradients, *, sequence=1, compression=None, incarnation=0):
    areas = []
    for gradient in gradients:
        area = torch.empty((compression or Compression()).nbytes(gradient.numel(), gradient.dtype), dtype=torch.uint8)
        (compression or Compression()).write(gradient, area)
        areas.append(area)
    push = Push(0, incarnation, sequence, 0, 0, gradients)
    return encode_push(push, areas)


def shard_of(part, run=None):
    shard = Shard(run or Settings())
    shard.open(dumps(part), generation=0, version=0)
    return shard


class Carrier:
    """Carries commands nowhere, and keeps the steps."""

    def __init__(self, steps):
        self.steps = steps

    def open(self, parts, version):
        pass

    def step(self, step):
        self.steps.append(step)

    def forget(self, worker):
        pass


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_shards_make_the_steps_of_one_server(kind, shards):
    whole = opening(kind, steps=0)
    copies = [nn.Parameter(p.detach().clone()) for p in whole.parameters]
    twins = {id(p): c for p, c in zip(whole.parameters, copies, strict=True)}
    server = ParameterServer(Opening(whole.names, copies, [], [], copy_optimizers(whole.optimizers, twins)), Settings())
    server.admit(0, 0)
    layout = share_out(whole.parameters, shards)
    group = [shard_of(part) for part in split(whole, layout)]
    for sequence in range(1, 5):
        gradients = [torch.randn_like(p) for p in copies]
        assert server.apply(Push(0, 0, sequence, server.version, 0, gradients)) == "applied"
        for places, shard in zip(layout, group, strict=True):
            mine = [gradients[place] for place in places]
            deposit = shard.deposit(0, push_bytes(mine, sequence=sequence))
            assert deposit.square == pytest.approx(sum(float((g.double() ** 2).sum()) for g in mine))
            assert shard.step(Step(0, 0, sequence, 0, sequence))
    order = places_of_groups(whole)
    cut = unpack_cuts([shard.cut() for shard in group], layout, order, server.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(server.snapshot().parameters, cut.parameters, strict=True))


@pytest.mark.parametrize("outer", ["mean", "nesterov"])
def test_shards_close_the_rounds_of_one_server(outer):
    run = Settings(local_steps=2, min_workers=2, outer=outer, lease_batches=1)
    whole = opening("sgd", steps=0)
    copies = [nn.Parameter(p.detach().clone()) for p in whole.parameters]
    twins = {id(p): c for p, c in zip(whole.parameters, copies, strict=True)}
    server = ParameterServer(Opening(whole.names, copies, [], [], copy_optimizers(whole.optimizers, twins)), run)
    server.admit(0, 0)
    server.admit(1, 0)
    server.leases.begin(0, [[0], [1, 2, 3]] * 3)
    layout = share_out(whole.parameters, 2)
    steps: list[Step] = []
    deciding = ShardedServer(pickle.loads(dumps(whole)), run, Carrier(steps), shards=2)
    deciding.admit(0, 0)
    deciding.admit(1, 0)
    deciding.leases.begin(0, [[0], [1, 2, 3]] * 3)
    group = [shard_of(part, run) for part in split(whole, layout)]
    for sequence in range(1, 4):
        ways = [[torch.randn_like(p) for p in copies] for _ in range(2)]
        leases = [[(0, 2 * sequence - 2 + worker)] for worker in range(2)]
        for book in (server.leases, deciding.leases):
            granted = [lease.id for worker in range(2) for lease in book.grant(worker, 0)]
            assert sorted(granted) == sorted(lease for leased in leases for lease in leased)
        pushes = [Push(w, 0, sequence, server.version, OUTER, ways[w], leases=leases[w]) for w in range(2)]
        assert server.apply_round(pushes, coordinator=0) == ["applied"] * 2
        assert deciding.apply_round(pushes, coordinator=0) == ["applied"] * 2
        for places, shard in zip(layout, group, strict=True):
            for w in range(2):
                areas = [ways[w][place].reshape(-1).view(torch.uint8) for place in places]
                mine = Push(w, 0, sequence, 0, OUTER, [ways[w][place] for place in places])
                shard.deposit(0, encode_push(mine, areas))
            assert all(shard.step(step) for step in steps[-2:])
    assert [step.closes for step in steps] == [False, True] * 3
    cut = unpack_cuts([shard.cut() for shard in group], layout, places_of_groups(whole), server.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(server.snapshot().parameters, cut.parameters, strict=True))


def test_shards_that_were_started_ahead_are_used_and_those_without_a_part_ended(monkeypatch):
    started, killed = [], []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(kill=killed.append))

    def start():
        opened = SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future())
        started.append(SimpleNamespace(open=opened))
        return started[-1]

    async def run():
        callbacks = dict.fromkeys(("on_lost", "on_saved", "on_error"), pytest.fail)
        group = ShardGroup(Settings(), RayOptions(shards=3), 1, Whereabouts.here(), **callbacks)
        monkeypatch.setattr(group, "_started", start)
        group.prepare()
        assert len(started) == 3
        group.open([b"one", b"other"], 0)
        assert group.actors == started[:2]
        assert killed == started[2:]
        group.open([b"one", b"other", b"third"], 1)  # as after an exchange of layers
        assert group.actors == [started[0], started[1], started[3]]
        group.close()
        assert killed == [started[2], started[0], started[1], started[3]]
        group.prepare()
        group.close()  # before any worker has opened the run
        assert killed[4:] == started[4:]
        assert len(killed) == 7

    asyncio.run(run())


def test_an_actor_that_has_ended_is_let_go():
    killed, handle = [], type("Handle", (), {})()
    process = ActorProcess(lambda handle=handle: killed.append(handle))
    gone = weakref.ref(handle)
    del handle
    process.ended(0)
    assert gone() is None, "Ray gives its cores to another only when nobody holds the actor"
    process.kill()
    assert not killed
    assert process.exitcode == 0


def test_a_shard_refuses_what_does_not_fit_and_goes_on():
    part = opening("sgd", steps=0)
    shard = shard_of(part)
    good = [torch.ones_like(p) for p in part.parameters]
    before = shard.read()
    wrong = {
        "dtype": push_bytes([g.double() for g in good]),
        "shape": push_bytes([torch.ones(p.numel() + 1) for p in part.parameters]),
        "oversize": push_bytes(good) + b"\0" * 1000,
        "random": torch.randint(0, 256, (500,), dtype=torch.uint8).numpy().tobytes(),
        "pickle": pickle.dumps(good),
        "half": push_bytes(good)[:-40],
    }
    for message in wrong.values():
        with pytest.raises(MalformedMessageError):
            shard.deposit(0, message)
    assert shard.read() == before
    assert shard.deposit(0, push_bytes(good)).finite
    with pytest.raises(MalformedMessageError, match="push 1 of worker 0 was sent before"):
        shard.deposit(0, push_bytes(good))
    assert not shard.deposit(7, push_bytes(good, sequence=2)).known  # of other layers
    assert shard.step(Step(0, 0, 1, 0, 1))
    assert not shard.step(Step(0, 0, 9, 0, 2))  # nobody sent it
    assert shard.read() != before


def test_a_shard_tells_gradients_that_are_not_finite():
    part = opening("sgd", steps=0)
    gradients = [torch.ones_like(p) for p in part.parameters]
    gradients[1][0] = math.nan
    assert not shard_of(part).deposit(0, push_bytes(gradients)).finite


def test_a_shard_that_takes_the_place_of_another_goes_on_from_its_copy():
    part = opening("adamw", steps=2)
    shard = shard_of(part)
    gradients = [torch.ones_like(p) for p in part.parameters]
    shard.deposit(0, push_bytes(gradients))
    shard.step(Step(0, 0, 1, 0, 1))
    saved, cut = shard.save(), shard.cut()
    fresh = Shard(Settings())
    with pytest.raises(RuntimeError, match="holds nothing yet"):
        fresh.read()
    fresh.open(saved, 0, 1)
    assert torch.load(io.BytesIO(fresh.cut()), weights_only=True).keys() == {"parameters", "optimizers"}
    for one in (shard, fresh):
        one.deposit(0, push_bytes(gradients, sequence=2))
        one.step(Step(0, 0, 2, 0, 2))
    assert shard.read() == fresh.read()
    assert shard.cut() != cut


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"address": 3}, TypeError, "`address` must be a text"),
        ({"shards": 0}, ValueError, "`shards` must be >= 1"),
        ({"shard_snapshot_steps": 0}, ValueError, "`shard_snapshot_steps` must be >= 1"),
        ({"cpus_per_worker": 0}, ValueError, "`cpus_per_worker` must be > 0"),
        ({"gpus_per_worker": -1}, ValueError, "`gpus_per_worker` must be >= 0"),
        ({"allow_without_token": "no"}, TypeError, "`allow_without_token`"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        RayOptions(**options)


def test_a_cluster_without_a_token_is_refused_unless_the_user_says_so(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(RuntimeError, match=r"without a token.*RAY_AUTH_MODE=token"):
        refuse_without_token(RayOptions(address="auto"))
    refuse_without_token(RayOptions(address="auto", allow_without_token=True))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    refuse_without_token(RayOptions(address="auto"))


def test_without_ray_the_error_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-accel\[ray\]'"):
        AsyncSGDStrategy(engine="ray")
    with pytest.raises(ValueError, match="`engine` must be one of"):
        AsyncSGDStrategy(engine="mpi")


def test_replicas_of_several_processes_are_refused_on_ray():
    with pytest.raises(ValueError, match="`devices_per_replica` must be 1 with `engine='ray'`"):
        refuse_replicas_elsewhere("ray", 2)
    refuse_replicas_elsewhere("shared_memory", 2)


def test_ray_is_not_imported_unless_asked_for():
    program = (
        "import sys, lightning_accel, lightning_accel.strategies\n"
        "from lightning.pytorch import Trainer\n"
        "lightning_accel.AsyncSGDStrategy(engine='shared_memory')\n"
        "import lightning_accel.strategies.engines, lightning_accel.async_sgd.ray_engine.run\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
