"""Projection functions on DTensors project the whole tensor, whatever its placement, or refuse it by name."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from projection_sharded_fits import leave

from lightning_accel.projection import (
    L1InfBall,
    MultilevelBall,
    project_l1,
    project_l1inf,
    project_l11,
    project_l12,
    project_multilevel,
    radius_for_sparsity,
)

FUNCTIONS = {
    "l1inf": lambda x, **k: project_l1inf(x, 3.0, **k),
    "l1inf columns": lambda x, **k: project_l1inf(x, 3.0, (1,), **k),
    "exact": lambda x, **k: project_l1inf(x, 3.0, method="exact", **k),
    "exact columns": lambda x, **k: project_l1inf(x, 3.0, (1,), "exact", **k),
    "l1": lambda x, **k: project_l1(x, 3.0, **k),
    "l12": lambda x, **k: project_l12(x, 3.0, **k),
    "l11": lambda x, **k: project_l11(x, 3.0, (1,), **k),
    "multilevel": lambda x, **k: project_multilevel(x, 3.0, ("linf", "l2"), ((0,), (1,)), **k),
}
BALLS = (L1InfBall(3.0), L1InfBall(3.0, (1,), "exact"), MultilevelBall(3.0, ("l1", "l2")))


def check_functions(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for shape in ((13, 9), (1, 6)):
        whole = torch.randn(shape)
        for placement in (Shard(0), Shard(1), Replicate()):
            for name, function in FUNCTIONS.items():
                sharded, want = distribute_tensor(whole, mesh, [placement]), function(whole)
                got = function(sharded)
                assert isinstance(got, DTensor), name
                assert got.placements == (placement,), name
                assert torch.equal(got.full_tensor(), want), (name, placement)
                assert torch.equal(sharded.full_tensor(), whole), name
                out = distribute_tensor(torch.zeros(shape), mesh, [placement])
                assert function(sharded, out=out) is out
                assert torch.equal(out.full_tensor(), want), name
                assert function(sharded, out=sharded) is sharded
                assert torch.equal(sharded.full_tensor(), want), name
            for method in ("bilevel", "exact"):
                radius = radius_for_sparsity(distribute_tensor(whole, mesh, [placement]), 0.5, (1,), method)
                assert radius == radius_for_sparsity(whole, 0.5, (1,), method)
            for ball in BALLS:
                leaf, shards = whole.clone().requires_grad_(), distribute_tensor(whole, mesh, [placement])
                shards.requires_grad_()
                ball(leaf).square().sum().backward()
                result = ball(shards)
                result.square().sum().full_tensor().backward()
                assert result.placements == (placement,)
                torch.testing.assert_close(shards.grad.full_tensor(), leaf.grad)
    partial = DTensor.from_local(whole, mesh, [Partial()])
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    refusals = [(lambda f=f: f(partial), "must be placed by Shard and Replicate, got P") for f in FUNCTIONS.values()]
    refusals += [(lambda: radius_for_sparsity(partial, 0.5), "must be placed by Shard")]
    refusals += [(lambda b=b: b(partial), "must be placed by Shard") for b in BALLS]
    wrong = (whole.clone(), distribute_tensor(whole, mesh, [Shard(1)]), sharded.to(torch.float64))
    refusals += [(lambda o=o: project_l1inf(sharded, 1.0, out=o), "`out` must be a DTensor like `x`") for o in wrong]
    refusals += [(lambda: project_l1inf(whole, 1.0, out=sharded), "`out` is a DTensor and `x` is not")]
    nan = distribute_tensor(torch.full((4, 3), float("nan")), mesh, [Shard(0)])
    refusals += [(lambda f=f: f(nan), "holds NaN") for f in FUNCTIONS.values()]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()
    skipped = project_l1inf(nan, 1.0, nonfinite="skip")
    assert bool(skipped.full_tensor().isnan().all())
    leave()


def test_functions_on_shards_equal_those_on_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(check_functions, (port,), 2, start_method="forkserver")
