"""Steps in which a projection has only to keep cleared what is cleared already: the same, for less."""

import math

import pytest
import torch
from torch import nn

from lightning_accel.projection.training import projector as module
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.ramp import Ramp
from lightning_accel.projection.training.targets import find_targets

STEPS, FULL = 24, 12  # steps, and from which on as many groups are cleared as ever will be


def walk(groups, dtype, *, nonfinite="raise", compile=False):
    """Return projector and model after steps of a random walk, and what was found and left in each of them."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(40, 16), nn.Conv2d(3, 16, 3)]).to(dtype)
    ball = Ball(target_sparsity=0.5, nonfinite=nonfinite)
    projector = Projector(find_targets(model, groups=groups), ball, Ramp("linear", 2, FULL), True, compile, True)
    seen = []
    for step in range(1, STEPS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, dtype=dtype)
        projector.project(step)
        found = [t for cut in projector.last.values() for t in (cut.norm, cut.tau, *cut.bounds, *cut.tops)]
        seen.append([*found, *(p.detach().clone() for p in model.parameters())])
    return projector, model, seen


@pytest.mark.parametrize("groups", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_new_to_clear_is_found_as_by_looking_each_time(monkeypatch, groups, dtype):
    looks = []
    slow = module.clear_alone
    monkeypatch.setattr(module, "clear_alone", lambda *a, **k: (looks.append(1), slow(*a, **k))[1])
    quick, _, mine = walk(groups, dtype)
    few = len(looks)
    monkeypatch.setattr(Projector, "_clear_again", lambda _, chosen, *__: list(chosen))
    careful, _, theirs = walk(groups, dtype)
    assert few <= 2 * (FULL - 2), "no look after the last group has gone"
    assert len(looks) - few == 2 * (STEPS - 3), "one for each parameter and step behind the start"
    at_once, _, compiled = walk(groups, dtype, compile=True)
    for now, then, in_one_call in zip(mine, theirs, compiled, strict=True):
        for a, b, c in zip(now, then, in_one_call, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    for a, b, c in zip(*(projector.memories.values() for projector in (quick, careful, at_once)), strict=True):
        assert torch.equal(a.dead, b.dead)
        assert torch.equal(a.dead, c.dead)
        assert int(a.dead.sum()) == len(a.dead) // 2 or len(a.dead) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_still_noticed(bad):
    projector, model, _ = walk("rows", torch.float32)
    alive = (model[0].weight != 0).any(1).nonzero()[0]
    with torch.no_grad():
        model[0].weight[alive, 0] = bad
    with pytest.raises(ValueError, match=r"`0\.weight` holds NaN"):
        projector.project(STEPS)
    skipping, model, _ = walk("rows", torch.float32, nonfinite="skip")
    with torch.no_grad():
        model[0].weight[alive, 0] = bad
        before = model[0].weight.clone()
    skipping.project(STEPS)
    assert torch.equal(model[0].weight.nan_to_num(7.0, 8.0), before.nan_to_num(7.0, 8.0))


def test_groups_that_a_checkpoint_brings_are_those_that_are_held():
    projector, _, _ = walk("rows", torch.float32)
    other, model, _ = walk("rows", torch.float32)
    state = {name: memory | {"dead": ~memory["dead"]} for name, memory in projector.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    other.load_state_dict(state)
    other.hold()
    for target in other.targets:
        rows = target.view().flatten(1)
        assert torch.equal((rows == 0).all(1), state[target.name]["dead"])
