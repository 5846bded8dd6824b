"""Batch-norm statistics computed anew: those of the parameters at hand, whatever was called how."""

import copy

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd.recompute import Recomputation


class Twice(nn.Module):
    """Calls a part with batch norm by a keyword, and one without."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, *, x):
        return self.head(self.part(x))


def batches(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 3, generator=generator) for _ in range(count)]


def test_statistics_are_the_means_over_the_remembered_batches():
    torch.manual_seed(0)
    module = Twice()
    recomputation = Recomputation(module, calls=4)
    for batch in batches(6):
        module(x=batch)
    with torch.no_grad():
        module.part[0].weight.mul_(3.0)
    count = int(module.part[1].num_batches_tracked)
    assert recomputation.recompute()
    hidden = [module.part[0](batch).detach() for batch in batches(6)[-4:]]
    expected = torch.stack([h.mean(0) for h in hidden]).mean(0)
    assert torch.allclose(module.part[1].running_mean, expected, atol=1e-6)
    variances = torch.stack([h.var(0) for h in hidden]).mean(0)
    assert torch.allclose(module.part[1].running_var, variances, atol=1e-5)
    assert module.part[1].momentum == 0.1
    assert int(module.part[1].num_batches_tracked) == count
    assert module.training
    assert module.part[2].training


def test_parts_called_on_their_own_are_remembered_too():
    module = Twice()
    recomputation = Recomputation(module)
    module.part(batches(1)[0])
    before = module.part[1].running_mean.clone()
    assert recomputation.recompute()
    assert not torch.equal(module.part[1].running_mean, before)


def test_evaluation_is_not_remembered_and_nothing_to_go_by_changes_nothing():
    module = Twice()
    recomputation = Recomputation(module)
    state = copy.deepcopy(module.state_dict())
    module.eval()
    module(x=batches(1)[0])
    module.train()
    with torch.no_grad():
        module.head(torch.zeros(1, 4))
    assert not recomputation.recompute()
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


def test_a_failed_call_does_not_end_the_remembering():
    module = Twice()
    recomputation = Recomputation(module)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(x=torch.zeros(2, 9))
    assert not recomputation.recompute()
    module(x=batches(1)[0])
    assert recomputation.recompute()
    recomputation.detach()
    module(x=batches(1)[0])
    assert not recomputation.recompute()


def test_calls_must_be_positive():
    with pytest.raises(ValueError, match=r"`calls` must be >= 1, got 0\."):
        Recomputation(nn.BatchNorm1d(2), calls=0)
