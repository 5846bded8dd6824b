"""A result that is written into memory its input shares is the one that memory of its own would get."""

import pytest
import torch
from torch import nn

from lightning_accel.projection import project_l1, project_l1inf, project_l12, project_multilevel, shrink
from lightning_accel.projection.kernels.layout import overlap
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import Target

FUNCTIONS = {
    "bilevel rows": lambda x, **k: project_l1inf(x, 2.0, **k),
    "bilevel columns": lambda x, **k: project_l1inf(x, 2.0, (1,), **k),
    "exact": lambda x, **k: project_l1inf(x, 2.0, method="exact", **k),
    "l1": lambda x, **k: project_l1(x, 2.0, **k),
    "l12": lambda x, **k: project_l12(x, 2.0, **k),
    "linf, l2": lambda x, **k: project_multilevel(x, 0.5, ("linf", "l2"), ((0,), (1,)), **k),
}


def views(base):
    """Return pairs of a tensor and a destination that share memory."""
    flat, square = base.flatten(), base[:8, :8]
    return {
        "later rows": (base[:-1], base[1:]),
        "earlier rows": (base[1:], base[:-1]),
        "shifted by one": (flat[:-1].view(-1, 1).expand(-1, 1), flat[1:].view(-1, 1)),
        "transposed": (square, square.t()),
        "columns": (base[:, :6], base[:, 3:9]),
        "every other": (flat[:40].view(8, 5), flat[:80:2].view(8, 5)),
        "the same view": (base[2:7], base[2:7]),
        "reversed order": (base[:8].flatten()[:64].view(8, 8), base[:8].flatten()[:64].view(8, 8).t()),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_result_does_not_depend_on_shared_memory(name, dtype):
    start = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kind in views(start):
        x, out = views(start.clone())[kind]
        expected = FUNCTIONS[name](x.clone())
        assert FUNCTIONS[name](x, out=out) is out
        assert torch.equal(out, expected), kind


def test_overlap_is_told_from_the_same_view_and_from_neighbours():
    base = torch.zeros(6, 4)
    assert overlap(base[:4], base[2:])
    assert overlap(base, base.flatten().view(4, 6))
    assert not overlap(base, base)
    assert not overlap(base[1:3], base[1:3])
    assert not overlap(base[:3], base[3:])
    assert not overlap(base, base.clone())
    assert not overlap(base[:0], base[:0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_that_want_gradients_and_expanded_ones_are_read_and_not_touched(name):
    x = torch.randn(1, 12).expand(20, 12)
    want = FUNCTIONS[name](x.clone())
    assert torch.equal(FUNCTIONS[name](x), want)
    with pytest.raises(ValueError, match="`out` is an expanded view"):
        FUNCTIONS[name](x, out=x)
    leaf = torch.randn(20, 12, requires_grad=True)
    before = leaf.detach().clone()
    result = FUNCTIONS[name](leaf)
    assert not result.requires_grad
    assert torch.equal(leaf, before)
    version = leaf._version
    FUNCTIONS[name](leaf, out=leaf)
    assert torch.equal(leaf.detach(), result)
    assert leaf._version > version  # autograd sees that it was written
    assert leaf.requires_grad


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", ["bilevel", "exact"])
@pytest.mark.parametrize("dims", [(0,), (1,)])
@pytest.mark.parametrize("shape", [(30, 12), (400, 1500)])
def test_a_default_device_elsewhere_changes_no_projection(shape, dims, method, compile):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = project_l1inf(x, 2.0, dims, method, compile=compile)
    with torch.device("meta"):
        found = project_l1inf(x, 2.0, dims, method, compile=compile)
    assert torch.equal(found, expected)


def test_a_default_device_elsewhere_changes_no_training_and_no_smaller_model():
    def sparse():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        return model, [Target("0.weight", model[0], "weight", (0,), (16, 6))]

    sizes = []
    for device in ("cpu", "meta"):
        model, targets = sparse()
        x = torch.randn(5, 6)
        with torch.device(device):
            for ball in (Ball(target_sparsity=0.5), Ball(radius=1.0), Ball(radius=1.0, method="exact")):
                clears = ball.target_sparsity is not None
                projector = Projector(targets, ball, freeze_zero_groups=clears, compile=True, zeros_only=clears)
                for step in (1, 2):
                    projector.project(step)
            found = shrink(model, x)
        sizes.append(found.parameters_after)
        assert torch.equal(found.kept["0"], (model[0].weight != 0).any(1).nonzero().flatten())
    assert sizes[0] == sizes[1] < 150
