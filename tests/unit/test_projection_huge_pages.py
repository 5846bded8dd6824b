"""Results in huge pages are tensors like any other, and memory goes round without two results sharing it."""

import copy
import gc
import pickle
import sys
from pathlib import Path

import pytest
import torch

from lightning_accel.projection import project_l1inf
from lightning_accel.projection.kernels import huge_pages
from lightning_accel.projection.kernels.huge_pages import empty_like_dense

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such memory")


@pytest.fixture(autouse=True)
def nothing_idle():
    gc.collect()
    huge_pages._idle.clear()
    yield
    huge_pages._idle.clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_new_tensors_are_tensors_like_any_other(dtype):
    x = torch.randn(3_000, 2_000, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    y = empty_like_dense(x)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), dtype)
    y.copy_(x)
    assert y.is_leaf
    assert y._base is None
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.nn.Parameter(y), y.clone()):
        assert torch.equal(other, x)
    again = empty_like_dense(x).zero_()
    del again
    assert torch.equal(y, x)


@linux
def test_a_dropped_result_lends_its_memory_to_the_next():
    x = torch.randn(2_000, 2_000)
    y = project_l1inf(x, 5.0)
    place = y.data_ptr()
    row = y[7]
    del y
    assert not huge_pages._idle  # the view still needs it
    expected = row.clone()
    z = project_l1inf(x, 5.0)
    assert z.data_ptr() != place
    assert torch.equal(row, expected)
    del row
    assert len(huge_pages._idle) == 1
    again = project_l1inf(x, 5.0)
    assert again.data_ptr() == place
    assert torch.equal(again, z)


@linux
def test_at_most_one_block_waits_and_another_size_frees_it():
    x = torch.empty(2_000, 2_000)
    results = [empty_like_dense(x) for _ in range(3)]
    assert len({r.data_ptr() for r in results}) == 3
    results.clear()
    assert len(huge_pages._idle) == 1
    larger = empty_like_dense(torch.empty(2_000, 2_001)).fill_(1.0)
    assert not huge_pages._idle
    assert larger.sum() == larger.numel()


@linux
def test_idle_memory_may_be_taken_by_the_system():
    """`LazyFree` in the map of memory is what the system takes first; nothing of it counts as needed."""
    x = torch.empty(4_000, 2_000)
    empty_like_dense(x).fill_(1.0)
    lazy = [
        int(line.split()[1])
        for line in Path("/proc/self/smaps").read_text().splitlines()
        if line.startswith("LazyFree:")
    ]
    assert sum(lazy) * 1024 >= 0.9 * x.numel() * 4


def test_small_tensors_are_left_to_torch():
    assert empty_like_dense(torch.empty(100, 100)).untyped_storage().resizable()
