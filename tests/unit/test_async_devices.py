"""Asynchronous SGD on devices, shown without one: who computes where, how copies go, optimizers that step elsewhere."""

import contextlib
import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import ParameterServer, Push, Settings, optimizer_side
from lightning_accel.async_sgd.optimizer_steps import refuse_unsupported
from lightning_accel.async_sgd.policy.server import ASSIGN
from lightning_accel.async_sgd.shared_memory.memory import aligned
from lightning_accel.async_sgd.shared_memory.spawn import resolve_start_method, starter
from lightning_accel.async_sgd.store import Opening
from lightning_accel.machine import transfers
from lightning_accel.strategies.replicas import device_of, number_of_workers

HOST = torch.device("cpu")
GPUS = [torch.device("cuda", i) for i in range(2)]


# --- who computes where


@pytest.mark.parametrize(
    ("devices", "each", "expected"),
    [
        (GPUS[:1], 2, [0, 0]),  # one shared by both
        (GPUS, 1, [0, 1]),  # one each
        (GPUS, 2, [0, 1, 0, 1]),
    ],
)
def test_workers_take_devices_in_turn(devices, each, expected):
    workers = number_of_workers(len(devices), each, 1)
    assert [device_of(worker, 0, devices, 1).index for worker in range(workers)] == expected


def test_ranks_of_a_replica_take_neighbouring_devices():
    four = [torch.device("cuda", i) for i in range(4)]
    assert number_of_workers(4, 1, 2) == 2
    assert [[device_of(w, r, four, 2).index for r in range(2)] for w in range(2)] == [[0, 1], [2, 3]]


def test_the_strategy_has_as_many_workers_as_share_its_devices():
    strategy = AsyncSGDStrategy(workers_per_device=3, parallel_devices=GPUS)
    assert strategy.num_processes == 6
    assert not strategy.computes_on_cpu
    assert AsyncSGDStrategy(parallel_devices=[HOST]).computes_on_cpu
    assert not AsyncSGDStrategy(parallel_devices=[HOST], optimizer_device="cuda:0").computes_on_cpu


# --- what is refused


def test_a_process_that_uses_cuda_is_not_forked(monkeypatch):
    with pytest.raises(ValueError, match="`start_method` must be 'auto', 'forkserver' or 'spawn' where CUDA is in use"):
        resolve_start_method("fork", on_cpu=False)
    assert resolve_start_method("fork") == "fork"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="a forked process cannot use CUDA, nor one whose parent has used it"):
        resolve_start_method("fork")
    assert resolve_start_method("auto") == "forkserver"
    assert resolve_start_method("spawn", on_cpu=False) == "spawn"


def test_workers_of_optimizers_on_a_device_are_not_forked():
    with pytest.raises(ValueError, match="where CUDA is in use, got 'fork'"):
        starter(print, (), Settings(optimizer_device="cuda"), "fork")


@pytest.mark.parametrize("value", ["gpu", "mps", "meta", "cuda:x"])
def test_a_device_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="`optimizer_device` must be 'cpu' or a CUDA device such as 'cuda:0'"):
        Settings(optimizer_device=value)


def test_a_device_is_named_by_a_text():
    with pytest.raises(TypeError, match="`optimizer_device` must be a text such as 'cpu' or 'cuda:0', got 0"):
        Settings(optimizer_device=0)


class Own(torch.optim.SGD):
    """An optimizer that torch does not know."""


def test_optimizers_of_others_stay_on_the_host():
    parameters = [nn.Parameter(torch.ones(2))]
    refuse_unsupported([Own(parameters, lr=0.1)])
    refuse_unsupported([torch.optim.SGD(parameters, lr=0.1)], "cuda")
    with pytest.raises(ValueError, match=r"`optimizer_device=cuda` moves the state of torch's own optimizers.*`Own`"):
        refuse_unsupported([Own(parameters, lr=0.1)], "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_not_there_is_refused_before_workers_start():
    strategy = AsyncSGDStrategy(optimizer_device="cuda:0")
    trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    with pytest.raises(MisconfigurationException, match="`optimizer_device=cuda:0` is no device of this machine"):
        trainer.strategy.check_devices()


def test_shards_on_ray_have_no_device(monkeypatch):
    monkeypatch.setattr("lightning_accel.strategies.engines.refuse_without_ray", lambda: None)
    with pytest.raises(ValueError, match="`optimizer_device` must be 'cpu' with `engine='ray'`"):
        AsyncSGDStrategy(engine="ray", optimizer_device="cuda")


def test_a_device_is_shared_by_workers_or_a_worker_has_several():
    with pytest.raises(ValueError, match="`workers_per_device=2` and `devices_per_replica=2` exclude each other"):
        AsyncSGDStrategy(workers_per_device=2, devices_per_replica=2)
    with pytest.raises(ValueError, match="`workers_per_device` must be >= 1"):
        AsyncSGDStrategy(workers_per_device=0)


# --- copies


def test_on_a_cpu_a_copy_is_done_when_the_call_returns():
    lane = transfers.lane_of([torch.ones(2), None])
    assert lane.device == HOST
    targets, sources = [torch.zeros(2), torch.zeros(3, dtype=torch.int64)], [torch.ones(2), torch.arange(3)]
    lane.begin(targets, sources)
    assert all(map(torch.equal, targets, sources))
    lane.begin([], [])
    lane.wait()
    copied, mark = transfers.send_to_host(sources[0])
    assert mark.is_passed()
    mark.wait()
    assert torch.equal(copied, sources[0])
    assert torch.equal(transfers.send_to_device(sources[1], HOST), sources[1])
    assert not transfers.pin(torch.zeros(8), HOST)
    lane.pin(torch.zeros(8))
    lane.unpin()


def test_tensors_of_several_devices_have_no_lane_of_their_own():
    assert transfers.lane_of([torch.ones(1), torch.ones(1, device="meta")]).device == HOST
    assert transfers.lane_of([]).device == HOST


class Runtime:
    """What torch shows of CUDA's runtime, with a limit on locked memory."""

    class cudaError:  # noqa: N801  # its name there
        success = 0

    def __init__(self, limit):
        self.limit, self.registered = limit, {}

    def cudaHostRegister(self, pointer, nbytes, flags):  # noqa: N802
        if nbytes > self.limit:
            return 2
        self.registered[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer):  # noqa: N802
        del self.registered[pointer]


class Stream:
    """A stream that writes down what it is asked for."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.notes.append(f"host waits for {self.name}")


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for CUDA: notes of streams, and a runtime that pins up to 100 bytes."""
    notes, runtime = [], Runtime(100)
    main = Stream("main", notes)

    @contextlib.contextmanager
    def within(stream):
        notes.append(f"begin {stream.name}")
        yield
        notes.append(f"end {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", notes))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    plain = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: notes.append("launch") or plain(*size))
    return notes, runtime


def test_copies_go_in_a_stream_of_their_own_after_what_came_before(cuda):
    notes, _ = cuda
    lane = transfers.Lane(GPUS[0])
    target = torch.empty(2)
    lane.copy([target], [torch.ones(2)])
    assert torch.equal(target, torch.ones(2))
    assert notes == ["side waits for main", "begin side", "end side", "main waits for side", "host waits for side"]


def test_memory_is_pinned_where_the_system_lets_it_and_given_back(cuda):
    notes, runtime = cuda
    lane = transfers.Lane(GPUS[0])
    small, large = torch.ones(10), torch.ones(1000)
    lane.pin(small)
    lane.pin(large)
    assert runtime.registered == {small.data_ptr(): 40}
    assert notes == ["launch"]  # which takes the refusal off the next one
    lane.unpin()
    assert runtime.registered == {}


# --- optimizers that step elsewhere: the copies of a device, in memory of the host

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def opened(kind, settings, dtypes):
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(3, 2, generator=generator).to(dtypes[0])),
        nn.Parameter(torch.ones(3).to(dtypes[1])),
    ]
    server = ParameterServer(
        Opening(["w", "b"], parameters, ["n"], [torch.zeros(2)], [OPTIMIZERS[kind](parameters)]), settings
    )
    server.admit(0, 0)
    server.live = 2
    return server


def pushed(server, sequence, base, flat):
    generator = torch.Generator().manual_seed(sequence)
    gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in server.parameters]
    memory = None
    if flat:  # as in a mailbox
        words = [aligned(g.nbytes) // 4 for g in gradients]
        memory = torch.zeros(sum(words))
        places = [
            memory[start : start + g.numel()].view(g.shape) for start, g in zip((0, words[0]), gradients, strict=True)
        ]
        for place, gradient in zip(places, gradients, strict=True):
            place.copy_(gradient)
        gradients = places
    bases = [p.detach().clone() for p in server.parameters] if server.settings.staleness == "delay_compensation" else []
    push = Push(
        worker=0, incarnation=0, sequence=sequence, base_version=base, optimizer=0, gradients=gradients, flat=memory,
        base=bases, buffers=[torch.full((2,), float(sequence))],
    )  # fmt: skip
    outcome = server.apply(push)
    for gradient in gradients:  # the mailbox is free now
        gradient.fill_(torch.nan)
    return outcome


def history(kind, settings, *, flat=True, dtypes=(torch.float32, torch.float32)):
    """Return all that shows of a server through pushes, an assignment, a snapshot, a restoration, and the end."""
    server, seen = opened(kind, settings, dtypes), []
    for sequence in range(1, 4):
        seen.append(pushed(server, sequence, max(0, sequence - 2), flat))
        seen += [v.detach().clone() for v in server.published()]
    cut = copy.deepcopy(server.snapshot())
    seen.append(pushed(server, 4, 3, flat))
    server.restore(cut)
    seen.append(pushed(server, 5, server.version, flat))
    values = [p.detach().cpu() * 0.5 for p in server.parameters]
    assign = Push(0, 0, 6, server.version, ASSIGN, values)
    seen.append(server.apply(assign))
    final = server.snapshot()
    seen += [*final.parameters, *final.buffers]
    state = server.state()
    assert all(p.device == HOST for p in state.parameters)
    seen += [p.detach() for p in state.parameters]
    for entry in state.optimizers[0].state_dict()["state"].values():
        seen += [entry[key] for key in sorted(entry)]
    return seen


@pytest.mark.parametrize("flat", [True, False], ids=["one piece", "pieces"])
@pytest.mark.parametrize("staleness", ["look_ahead", "inverse", "delay_compensation"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_elsewhere_make_the_same_bits(kind, staleness, flat, monkeypatch):
    settings = Settings(staleness=staleness)
    expected = history(kind, settings, flat=flat)
    monkeypatch.setattr(optimizer_side, "is_far", lambda device: True)
    actual = history(kind, settings, flat=flat)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a == e


def test_parameters_of_two_types_go_elsewhere_one_by_one(monkeypatch):
    types = torch.float32, torch.float64
    expected = history("sgd", Settings(), flat=False, dtypes=types)
    monkeypatch.setattr(optimizer_side, "is_far", lambda device: True)
    for a, e in zip(history("sgd", Settings(), flat=False, dtypes=types), expected, strict=True):
        assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a == e


def test_parameters_and_states_lie_elsewhere_in_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(optimizer_side, "is_far", lambda device: True)
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    before = dict(optimizer.state[parameters[0]])
    where = parameters[0].data_ptr()
    side = optimizer_side.OptimizerSide(HOST, parameters, [optimizer])
    assert parameters[0].data_ptr() != where
    after = optimizer.state[parameters[0]]
    assert after["exp_avg"].data_ptr() != before["exp_avg"].data_ptr()
    assert after["step"] is before["step"]  # torch counts steps on the host
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert side.published(parameters)[0].data_ptr() != parameters[0].data_ptr()
