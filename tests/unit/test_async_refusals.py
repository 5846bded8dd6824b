"""What other people's optimizers, data and launchers ask of the asynchronous strategy, without processes."""

import functools
import multiprocessing
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import lightning_accel
from lightning_accel.async_sgd.module_buffers import ModuleBuffers, give_buffers_own_memory
from lightning_accel.async_sgd.optimizer_steps import SentGroups, refuse_unsupported
from lightning_accel.async_sgd.policy.buffers import buffer_roles
from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers, dumps
from lightning_accel.async_sgd.shared_memory import spawn
from lightning_accel.async_sgd.shared_memory.spawn import resolve_start_method
from lightning_accel.async_sgd.shared_memory.unpicklable import what_cannot_be_pickled
from lightning_accel.machine.openmp import rest_threads
from lightning_accel.strategies.refusals import refuse_other_launchers
from lightning_accel.strategies.worker_process.same_data import fingerprint


class Clipped(torch.optim.SGD):
    def __init__(self, params, lr=0.1, limit=0.1):
        super().__init__(params, lr)
        self.limit = limit


class Lookahead(torch.optim.Optimizer):
    """Every other step goes half of the way of an optimizer inside."""

    def __init__(self, params, lr=0.1):
        self.optimizer = Clipped(params, lr, limit=0.3)
        super().__init__(self.optimizer.param_groups, {"lr": lr})
        self.param_groups = self.optimizer.param_groups
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1


class TakesLoss(torch.optim.SGD):
    """A step as long as the loss says."""

    def step(self, closure=None):
        loss = 1.0 if closure is None else float(closure())
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"] * loss)


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        if closure is not None:
            closure()
            closure()
        super().step()


class NeedsClosure(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("closure needed")
        super().step(closure)


class TwoSteps(torch.optim.SGD):
    def first_step(self): ...

    def second_step(self): ...


class Switched(torch.optim.SGD):
    def train(self): ...

    def eval(self): ...


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TakesLoss, r"`TakesLoss` uses the loss in one step"),
        (Twice, r"`Twice` evaluates the loss 2 times in one step"),
        (NeedsClosure, r"`NeedsClosure.step\(\)` fails without a closure \(RuntimeError: closure needed\)"),
        (TwoSteps, r"`TwoSteps` makes a step of two \(`first_step`, `second_step`\)"),
        (Switched, r"`Switched` has one set of parameters to train and one to evaluate"),
        (torch.optim.SparseAdam, "SparseAdam needs sparse gradients"),
        (torch.optim.LBFGS, "LBFGS evaluates the loss several times"),
    ],
)
def test_what_cannot_step_without_a_loss_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        refuse_unsupported([make(parameters(), lr=0.1)])


@pytest.mark.parametrize(
    "make",
    [Clipped, Lookahead, torch.optim.NAdam, torch.optim.Rprop, functools.partial(torch.optim.Adagrad, lr_decay=0.1)],
)
def test_all_else_is_taken_and_neither_changed_nor_draws_random_numbers(make):
    held = parameters()
    optimizer = make(held, lr=0.1)
    before, random = [p.detach().clone() for p in held], torch.get_rng_state()
    refuse_unsupported([optimizer])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert not any(float(state.get("step", 0)) for state in optimizer.state.values())
    assert getattr(optimizer, "count", 0) == 0


def test_a_copy_has_attributes_inner_optimizers_and_state_over_the_new_parameters():
    mine, theirs = parameters(), parameters()
    optimizer = Lookahead(mine)
    for parameter in mine:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.optimizer.state[mine[0]]["seen"] = torch.ones(2)
    (copied,) = copy_optimizers([optimizer], dict(zip(map(id, mine), theirs, strict=True)))
    assert (copied.count, copied.optimizer.limit) == (1, 0.3)
    assert copied.param_groups is copied.optimizer.param_groups
    assert [id(p) for p in copied.param_groups[0]["params"]] == [id(p) for p in theirs]
    assert copied.optimizer.state[theirs[0]]["seen"].tolist() == [1.0, 1.0]
    assert pickle.loads(dumps(copied)).optimizer.limit == 0.3


def test_an_attribute_that_cannot_be_pickled_is_named():
    optimizer = Clipped(parameters())
    optimizer.source = (n for n in range(3))
    with pytest.raises(ValueError, match=r"`Clipped.source` \(generator\) cannot be pickled"):
        copy_optimizers([optimizer], {})
    local = type("Local", (torch.optim.SGD,), {})(parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Local cannot be pickled"):
        copy_optimizers([local], {})


def test_only_hyper_parameters_that_changed_here_are_sent():
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["counted"] = 0
    groups = SentGroups(optimizer)
    assert groups.take() is None
    optimizer.param_groups[0]["lr"] = 0.05
    assert groups.changed() == [{"lr": 0.05}]
    assert groups.take() == [{"lr": 0.05}]
    assert groups.take() is None
    optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    assert groups.take() is not None
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert groups.changed()[0]["lr"] == 0.025
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(groups.take() or []) == 2


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("running_mean", torch.zeros(2))


def test_only_statistics_of_normalization_layers_are_averaged():
    names = [name for name, _ in Part().named_buffers()]
    assert names == ["running_mean", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert buffer_roles(Part(), names) == ["own", "average", "average", "count"]
    assert buffer_roles(None, names) == ["own"] * 4


def test_a_buffer_that_was_replaced_is_found_unless_its_shape_changed():
    module = Part()
    buffers = ModuleBuffers(module, dict(module.named_buffers()))
    module.running_mean = torch.ones(2)
    assert buffers.now()["running_mean"] is module.running_mean
    module.running_mean = torch.ones(3)
    assert buffers.now()["running_mean"].tolist() == [1.0, 1.0]


class Data:
    def __init__(self):
        self.stream = (n for n in range(3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)


def test_what_cannot_be_pickled_is_named_by_class_and_path():
    assert what_cannot_be_pickled({"model": Model(), "n": [1, 2]}) is None
    assert what_cannot_be_pickled((1, [Data()])) == "Data.stream (generator)"
    model = Model()
    model.part.activation = lambda x: x
    assert what_cannot_be_pickled(model) == "Model.part.activation (function)"
    model = Model()
    model.lock = {"a": [threading.Lock()]}
    assert what_cannot_be_pickled(functools.partial(print, model)) == "Model.lock['a'][0] (lock)"
    model = Model()
    model.cached = model.part(torch.ones(2))
    assert what_cannot_be_pickled(model) == "Model.cached (Tensor)"


def test_the_search_for_what_cannot_be_pickled_leaves_ways_that_lead_back():
    class Local:
        pass

    owner = Model()
    owner.connector = Model()
    owner.connector.owner = owner  # cannot be pickled for its owner's sake alone
    owner.callbacks = [Local()]
    found = "Local (test_the_search_for_what_cannot_be_pickled_leaves_ways_that_lead_back.<locals>.Local)"
    assert what_cannot_be_pickled(owner) == found


def test_workers_are_forked_where_that_is_safe_only(monkeypatch):
    assert resolve_start_method("spawn") == "spawn"
    assert resolve_start_method("auto", on_cpu=False) == "forkserver"
    done = threading.Event()
    beside = threading.Thread(target=done.wait)
    beside.start()
    assert resolve_start_method("auto") == "forkserver"
    done.set()
    beside.join()
    if sys.platform == "linux" and threading.active_count() == 1:
        assert resolve_start_method("auto") == "fork"
        monkeypatch.setattr(spawn, "rest_threads", lambda: False)  # OpenMP threads that would not survive
        assert resolve_start_method("auto") == "fork"
        assert resolve_start_method("auto", threads=2) == "forkserver"


def test_a_forked_process_computes_with_threads_of_its_own():
    def compute():
        return float(torch.ones(1_000_000).mul_(2).sum())

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert compute() == 2e6  # now this process has threads that a fork does not copy
        if not rest_threads():  # another runtime than GNU's: workers are not forked from such a process
            assert resolve_start_method("auto", threads=2) == "forkserver"
            return
        child = multiprocessing.get_context("fork").Process(target=compute)
        child.start()
        child.join(20)
        code = child.exitcode
        child.kill()
        assert code == 0
        assert compute() == 2e6
    finally:
        torch.set_num_threads(threads)


def test_one_machine_and_no_other_launcher(monkeypatch):
    with pytest.raises(MisconfigurationException, match="`num_nodes` must be 1 with `async_sgd`, got 2"):
        Trainer(strategy="async_sgd", accelerator="cpu", devices=2, num_nodes=2, logger=False)
    strategy = lightning_accel.AsyncSGDStrategy()
    Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
    assert strategy.num_nodes == 1
    refuse_other_launchers(strategy)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MisconfigurationException, match="one of several that a launcher has started"):
        refuse_other_launchers(strategy)
    monkeypatch.delenv("WORLD_SIZE")
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with monkeypatch.context() as alone:
            alone.setenv(name, "1")
            refuse_other_launchers(strategy)
            alone.setenv(name, "2")
            with pytest.raises(MisconfigurationException, match=rf"\(MPI: {name}=2\).*no mpirun"):
                refuse_other_launchers(strategy)


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)


def _split(seed):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    return order[:30].tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda kept: Subset(TensorDataset(torch.arange(40)), kept),
        lambda kept: ConcatDataset([Subset(TensorDataset(torch.arange(40)), kept), TensorDataset(torch.ones(3))]),
        lambda kept: TensorDataset(torch.arange(40.0)[kept], torch.ones(30)),
        lambda kept: Rows(np.arange(40)[kept]),
        lambda kept: Rows([f"{i}.png" for i in kept]),
        lambda kept: Subset(Subset(TensorDataset(torch.arange(40)), kept), range(9)),
    ],
    ids=["subset", "concatenated", "tensors", "array", "names", "subset of a subset"],
)
def test_another_split_in_another_worker_is_seen(make):
    assert fingerprint(make(_split(0))) == fingerprint(make(_split(0)))
    assert fingerprint(make(_split(0))) != fingerprint(make(_split(1)))


def test_what_is_no_data_of_items_is_not_compared():
    one, other = Rows([0.5] * 30), Rows([0.5] * 30)
    one.cache, other.cache = {}, {0: 1}
    one.seen, other.seen = torch.zeros(2), torch.ones(2)
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(object()) == fingerprint(object())


def test_a_buffer_that_is_expanded_gets_memory_of_its_own():
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(1).expand(3))
    module.register_buffer("mean", mean := torch.zeros(3))
    give_buffers_own_memory(module)
    module.mask[0] = 5.0
    assert module.mask.tolist() == [5.0, 1.0, 1.0]
    assert module.mean is mean
    known = ModuleBuffers(module, dict(module.named_buffers()))
    module.mask = torch.full((1,), 7.0).expand(3)
    assert known.now()["mask"].tolist() == [5.0, 1.0, 1.0]
