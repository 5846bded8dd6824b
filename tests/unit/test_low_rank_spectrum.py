"""Trained and random weights are told apart, at every size and scale."""

import pytest
import torch
from torch import nn

from lightning_accel.low_rank.spectrum import looks_untrained


def decaying(layer):
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        layer.weight.copy_(((u * (s[0] / (1.0 + torch.arange(len(s))))) @ v).view_as(layer.weight))
    return layer


def models(seed):
    torch.manual_seed(seed)
    yield nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    yield nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 700))
    yield nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv1d(32, 64, 1))


@pytest.mark.parametrize("initialize", [None, nn.init.normal_, nn.init.xavier_uniform_, nn.init.kaiming_normal_])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fresh_weights_look_untrained(seed, initialize):
    for model in models(seed):
        for layer in model:
            if initialize is not None:
                initialize(layer.weight)
        assert looks_untrained(model)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_with_large_singular_values_look_trained(seed):
    for model in models(seed):
        for layer in model:
            decaying(layer)
        assert not looks_untrained(model)


def test_training_shows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x, noise = torch.randn(256, 32), torch.random.get_rng_state()
    target = x[:, :8].argmax(dim=1)
    assert looks_untrained(model)
    assert torch.equal(noise, torch.random.get_rng_state()), "the random state is left alone"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert not looks_untrained(model)


def test_nothing_to_look_at_and_broken_weights_are_no_evidence():
    broken = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        broken[0].weight.fill_(float("nan"))
    assert not looks_untrained(broken)
    assert not looks_untrained(nn.Sequential(nn.ReLU()))
    zero = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(zero[0].weight)
    assert not looks_untrained(zero)
    assert not looks_untrained(nn.Sequential(nn.Linear(2, 2)))
