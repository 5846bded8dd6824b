"""Parts of the asynchronous strategy without processes: what it refuses, leases, shows, and how it is found."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

import lightning_accel
from lightning_accel.async_sgd import Lease, Settings, Statistics, Worker
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.shared_memory.client import SharedMemoryStore
from lightning_accel.async_sgd.shared_memory.memory import ParameterPage
from lightning_accel.async_sgd.shared_memory.supervisor import Supervisor
from lightning_accel.strategies.live import Rates, live_table, render
from lightning_accel.strategies.registration import register_by_name
from lightning_accel.strategies.worker_process.checkpoints import rewind_loops
from lightning_accel.strategies.worker_process.leased_data import lease_batches, refuse_unleasable
from lightning_accel.strategies.worker_process.shared_epochs import UnitsOfEpoch


def test_importing_the_package_imports_neither_torch_nor_lightning():
    script = "import sys, lightning_accel; assert not {'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_registering_again_changes_nothing():
    from lightning.pytorch.strategies import StrategyRegistry

    before, finders = StrategyRegistry["async_sgd"], list(sys.meta_path)
    register_by_name()
    assert StrategyRegistry["async_sgd"] is before
    assert len(sys.meta_path) <= len(finders) + 1  # pytorch_lightning may still be waited for


def test_an_unknown_public_name_is_an_attribute_error():
    from lightning_accel import strategies

    with pytest.raises(AttributeError, match="has no attribute 'SyncSGD'"):
        _ = strategies.SyncSGD


def test_constructor_refuses_and_survives_pickling():
    import copy
    import pickle

    with pytest.raises(ValueError, match=r"`snapshot_every_n_steps` must be >= 1 or None, got 0"):
        lightning_accel.AsyncSGDStrategy(snapshot_every_n_steps=0)
    with pytest.raises(ValueError, match=r"`n_push` must be >= 1, got 0"):
        lightning_accel.AsyncSGDStrategy(n_push=0)
    with pytest.raises(ValueError, match=r"`start_method` must be one of auto, fork, forkserver, spawn, got 'thread'"):
        lightning_accel.AsyncSGDStrategy(start_method="thread")
    strategy = lightning_accel.AsyncSGDStrategy(compression="topk", kept=0.5)
    for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert other.settings == strategy.settings


def test_defaults_of_core_strategy_and_command_line_are_the_same():
    import dataclasses
    import inspect

    from hydra import compose, initialize_config_module

    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        chosen = dict(compose("train", overrides=["strategy=async_sgd"]).trainer.strategy)
    assert lightning_accel.AsyncSGDStrategy().settings == Settings()
    taken = inspect.signature(lightning_accel.AsyncSGDStrategy.__init__).parameters
    del chosen["_target_"]
    assert {name: taken[name].default for name in chosen} == chosen
    wanted = {field.name for field in dataclasses.fields(Settings)} - {"record_log"}
    assert wanted <= set(chosen)
    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        on_ray = dict(compose("train", overrides=["strategy=async_sgd_ray"]).trainer.strategy)
    del on_ray["_target_"]
    assert on_ray == chosen | {"engine": "ray"}
    assert {field.name for field in dataclasses.fields(RayOptions)} - {"gpus_per_worker"} <= set(chosen)


def test_collectives_in_training_are_refused_and_harmless_in_evaluation():
    class Stage:
        training = True

    strategy = lightning_accel.AsyncSGDStrategy()
    tensor = torch.ones(2)
    assert strategy.all_gather(tensor) is tensor
    strategy._trainer = Stage()
    with pytest.raises(RuntimeError, match=r"`all_gather` in training waits for all workers"):
        strategy.all_gather(tensor)
    assert strategy.reduce(tensor) is tensor
    assert strategy.reduce_boolean_decision(False) is False
    assert strategy.broadcast("x") == "x"


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_data_that_can_not_be_shared_out_are_refused():
    with pytest.raises(ValueError, match=r"an IterableDataset has no indices to share out"):
        refuse_unleasable(DataLoader(Endless()))
    dataset = TensorDataset(torch.arange(8))
    split = DataLoader(dataset, sampler=DistributedSampler(dataset, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match=r"a DistributedSampler gives each process a fixed part"):
        refuse_unleasable(split)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_leased_loader_hands_out_what_is_leased_and_says_so(workers):
    dataset = TensorDataset(torch.arange(12))
    plain = DataLoader(dataset, batch_size=3, num_workers=workers)
    share = Blocks([[2], [0, 1], []])
    leased = lease_batches(plain, share, eager=workers == 0)
    assert isinstance(leased, DataLoader)
    assert len(leased) == len(plain) == 4
    batches = [batch[0].tolist() for batch in leased]
    assert batches == [[6, 7, 8], [0, 1, 2], [3, 4, 5]]
    assert share.in_hand == [(0, 2), (0, 0), (0, 1)]
    assert share.loads[:2] == [True, False], "what is being loaded can be watched"
    assert isinstance(plain.batch_sampler, BatchSampler)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_begins_anew_gives_back_what_it_has_leased_and_not_yielded(workers):
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=3, num_workers=workers)
    share = Blocks([[0, 1, 2], [3], []])
    leased = lease_batches(loader, share, eager=workers == 0)
    first = iter(leased)
    assert next(first)[0].tolist() == [0, 1, 2]
    share.blocks = [[0, 1, 2], [3], []]
    again = iter(leased)
    loaded = [(0, 0), (0, 1), (0, 2), (0, 3)] if workers else [(0, 0), (0, 1), (0, 2)]
    assert share.returned == loaded, "what was yielded and never trained on, what was loading, the rest of the block"
    assert [batch[0].tolist()[0] for batch in again] == [0, 3, 6, 9]
    assert share.in_hand == [(0, 0), (0, 1), (0, 2), (0, 3)]


class Blocks:
    """Leases these positions of an epoch, block by block."""

    def __init__(self, blocks):
        self.blocks, self.in_hand, self.returned, self.loads = blocks, [], [], []

    def take(self, units):
        order = units.first(float("inf"))
        return [Lease(0, position, order[position]) for position in self.blocks.pop(0)]

    def begin_anew(self, loading):
        self.returned += [*self.in_hand, *loading]
        self.in_hand.clear()

    def check_asked(self, loader, asked):
        assert asked

    def loading(self, busy):
        self.loads.append(busy)


def test_an_order_without_a_length_is_drawn_piece_by_piece_and_goes_on_elsewhere():
    class Endless:
        def __iter__(self):
            drawn.append("begun")
            yield from itertools.count()

    drawn = []
    units = UnitsOfEpoch(Endless())
    assert not units.has_length
    assert units.more(0, piece=2, limit=float("inf")) == ([0, 1], False)
    assert units.more(2, piece=2, limit=5) == ([2, 3], False)
    assert units.more(4, piece=2, limit=5) == ([4], True)
    assert drawn == ["begun"]
    assert UnitsOfEpoch(Endless()).more(4, piece=2, limit=5) == ([4], True), "in another process"
    finite = UnitsOfEpoch(iter(range(3)))
    assert finite.more(0, piece=2, limit=float("inf")) == ([0, 1], False)
    assert finite.more(2, piece=2, limit=float("inf")) == ([2], True)


def opened(parameters, optimizer):
    return Worker(None, Settings(), parameters, {}, [optimizer])


def test_an_optimizer_with_a_foreign_parameter_is_refused():
    mine, foreign = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"SGD holds a parameter of shape \(3, 4\) that the module does not have"):
        opened({"mine": mine}, torch.optim.SGD([mine, foreign], lr=0.1))


def test_step_hooks_and_compression_exclude_each_other():
    from lightning_accel.async_sgd import Compression

    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    worker = Worker(None, Settings(compression=Compression("fp16")), {"p": parameter}, {}, [optimizer])
    with pytest.raises(ValueError, match=r"a step hook of the optimizer may change parameters"):
        worker.attach()


def test_the_opening_copies_optimizers_with_their_parameters():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    opening = opened({"p": parameter}, optimizer).opening(version=1)
    (copied,) = opening.optimizers
    assert copied.param_groups[0]["params"][0] is opening.parameters[0]
    assert copied.param_groups[0]["params"][0] is not parameter
    assert torch.equal(copied.state[opening.parameters[0]]["momentum_buffer"], torch.ones(2))


def test_workers_with_different_models_are_told_which_tensor():
    store = SharedMemoryStore.__new__(SharedMemoryStore)
    store.worker = 1
    store._page = ParameterPage([TensorSpec("w", torch.Size([2]), torch.float32)], 1)
    store.check([torch.zeros(2)], [])
    with pytest.raises(ValueError, match=r"worker 1 built another model than the coordinator \(w differs\)"):
        store.check([torch.zeros(3)], [])
    with pytest.raises(ValueError, match=r"\(their number differs\)"):
        store.check([torch.zeros(2), torch.zeros(2)], [])


def test_a_run_needs_a_worker():
    with pytest.raises(ValueError, match=r"`workers` must be >= 1, got 0"):
        Supervisor(0, Settings(), lambda *_: None)


def test_the_live_table_has_a_row_a_worker(capsys):
    statistics = Statistics(version=9, worker_pushes=(6, 3), staleness_mean=0.5, live_workers=2)
    table = render(statistics, 3, [2.0])
    assert table.row_count == 3
    assert "step 9" in table.caption
    assert [list(column.cells) for column in table.columns][1:3] == [["6", "3", "0"], ["2.0", "-", "-"]]
    strategy = lightning_accel.AsyncSGDStrategy(live=True)
    with live_table(strategy) as on_tick:
        on_tick(statistics)
    assert strategy.statistics is statistics
    assert "step 9" in capsys.readouterr().out


def test_rates_are_those_of_the_last_seconds():
    times = iter([0.0, 1.0, 2.0, 6.0, 7.0])
    rates = Rates(lambda: next(times))
    assert rates.of(()) == []
    assert rates.of((10,)) == [10.0]
    assert rates.of((10, 4)) == [5.0, 2.0]
    assert rates.of((30, 4)) == [5.0, 0.0]
    assert rates.of((40, 5)) == [10.0, 1.0]


def test_loops_of_a_checkpoint_count_the_batches_of_all_workers():
    from lightning_accel.async_sgd import Snapshot

    def trackers(done):
        return dict.fromkeys(("ready", "started", "processed", "completed"), done)

    progress = {"current": trackers(3), "total": trackers(13)}
    checkpoint = {"epoch": 1, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    epochs = [{"epoch": 1, "units": [[0], [1], [2], [3], [4], [5], [6], [7]], "done": [0, 1, 2, 5, 6]}]
    cut = Snapshot(5, [5], [], [], [], epochs)
    assert rewind_loops(checkpoint, cut, pending=1, batches=8) == {"epochs": epochs}
    assert progress == {"current": trackers(6), "total": trackers(16)}
    opaque = [{**epochs[0], "units": [("a",)] * 8}]
    assert rewind_loops(checkpoint, Snapshot(5, [5], [], [], [], opaque), pending=0, batches=8) == {"epochs": []}


def test_a_snapshot_is_whole_although_its_writer_stops_half_way(tmp_path, monkeypatch):
    from lightning_accel.strategies.worker_process import snapshots

    class Trainer:
        default_root_dir = tmp_path
        state = "first"

        def __init__(self):
            self.strategy = self
            self.checkpoint_io = "the user's own"

        def save_checkpoint(self, path):
            self.checkpoint_io.save_checkpoint({"state": self.state}, path)

    def fail(checkpoint, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    trainer = Trainer()
    snapshots.save_snapshot(trainer)
    trainer.state = "second"
    with monkeypatch.context() as patch:
        patch.setattr(snapshots.torch, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            snapshots.save_snapshot(trainer)
    assert torch.load(tmp_path / snapshots.NAME, weights_only=True) == {"state": "first"}
    assert trainer.checkpoint_io == "the user's own"
    snapshots.remove_part(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [snapshots.NAME]
    snapshots.save_snapshot(trainer)
    assert torch.load(tmp_path / snapshots.NAME, weights_only=True) == {"state": "second"}
