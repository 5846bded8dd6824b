"""A result that is written into memory its input shares is the one that memory of its own would get."""

import pytest
import torch

from lightning_accel.projection import project_l1, project_l1inf, project_l12, project_multilevel
from lightning_accel.projection.kernels.layout import overlap

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
