"""Shards on two processes equal the whole tensor, bit for bit."""

import itertools
import os
import socket

import pytest
import torch
import torch.multiprocessing
from projection_sharded_fits import CASES, leave, train, train_shards, whole
from torch import nn

from lightning_accel.projection.sharded import check_placements
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import find_targets

BALLS = [
    Ball(radius=0.5),
    Ball(target_sparsity=0.5),
    Ball(radius=0.5, scope="global"),
    Ball(radius=0.5, norms=("l1", "l2")),
    Ball(radius=0.5, method="exact"),
    Ball(target_sparsity=0.5, method="exact"),
]


def model():
    torch.manual_seed(0)
    # rows that two processes share unevenly, and a layer of which the second process holds nothing
    return nn.ModuleList([nn.Linear(5, 7), nn.Linear(4, 1), nn.Conv2d(3, 4, 3)])


def project_shards(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for ball, groups, dim in itertools.product(BALLS, ("rows", "columns"), (0, 1)):
        whole, sharded = model(), model()
        for layer in sharded:
            weight = torch.distributed.tensor.distribute_tensor(
                layer.weight.detach(), mesh, [torch.distributed.tensor.Shard(dim)]
            )
            layer.weight = nn.Parameter(weight)
        for network in (whole, sharded):
            projector = Projector(find_targets(network, groups=groups), ball)
            projector.remember_first_norms()
            projector.project(1)
        assert not torch.equal(whole[0].weight, model()[0].weight)
        for mine, expected in zip(sharded, whole, strict=True):
            assert torch.equal(mine.weight.full_tensor(), expected.weight), (ball, dim)
    leave()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(work, *args):
    """Call ``work(rank, *args, port)`` in processes of the fork server, which has imported what takes seconds."""
    torch.multiprocessing.start_processes(work, (*args, free_port()), nprocs=2, start_method="forkserver")


@pytest.mark.slow
def test_sharded_equals_unsharded_bit_for_bit():
    in_two_processes(project_shards)


def test_partial_sums_are_refused():
    with pytest.raises(ValueError, match="must be placed by Shard and Replicate"):
        check_placements([torch.distributed.tensor.Partial()])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_fit_equals_an_unsharded_one_bit_for_bit_and_resumes(case, tmp_path):
    callback = CASES[case]()
    trainer, net = train(callback, shards=False)
    in_two_processes(train_shards, case, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one["projections"] == callback.projections
    assert one["steps"] == trainer.global_step == 18
    expected = whole(net)
    assert any((expected[name] == 0).any() for name in expected)
    for rank in (one, other):
        assert rank["logged"] == {k: float(v) for k, v in trainer.callback_metrics.items()}
        for state in (rank["state"], rank["resumed"]):
            assert list(state) == list(expected)
            for name, value in state.items():
                assert torch.equal(value, expected[name]), name
