"""Workers that share a device, and optimizers that step elsewhere, in runs with real shared memory."""

import pytest
import torch
from async_modules import QUICK, Classifier, fit, seeded
from async_workers import check_ending, run_threads

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import optimizer_side

BOTH = ("here 0 0", "here 1 0")


@pytest.mark.parametrize("settings", [{}, {"n_push": 2}, {"local_steps": 2}], ids=str)
def test_a_run_whose_optimizer_steps_elsewhere_ends_as_one_on_the_host(settings, monkeypatch):
    """One worker, so that both runs make the same pushes in the same order."""
    here = run_threads(1, 2, die=None, **settings)
    asked = []
    monkeypatch.setattr(optimizer_side, "is_far", lambda device: asked.append(device) or True)
    there = run_threads(1, 2, die=None, **settings)
    assert asked
    assert there.snapshot.version == here.snapshot.version > 0
    for a, e in zip(there.snapshot.parameters, here.snapshot.parameters, strict=True):
        assert torch.equal(a, e)


def test_with_several_workers_the_log_replays_to_what_the_device_holds(monkeypatch):
    monkeypatch.setattr(optimizer_side, "is_far", lambda device: True)
    check_ending(run_threads(2, 3, die=None, wait_for=BOTH), 3)


@pytest.mark.slow
def test_two_workers_share_one_device(tmp_path):
    strategy = AsyncSGDStrategy(**QUICK, workers_per_device=2)
    trainer = fit(tmp_path, strategy, seeded(Classifier), devices=1, epochs=4)
    assert trainer.num_devices == 1
    assert len(strategy.statistics.worker_pushes) == 2
    assert sum(strategy.statistics.worker_pushes) == trainer.global_step == 4 * 8
