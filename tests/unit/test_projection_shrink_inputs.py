"""`shrink` folds nothing that depends on an input, and takes no two outputs for equal that differ."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_accel.projection.shrink import shrink
from lightning_accel.projection.shrink.nested import tensors_in, with_tensors
from lightning_accel.projection.shrink.probes import make_probes
from lightning_accel.projection.shrink.readings import difference

CONSTANT = "its constant is not the same everywhere"


class Between(nn.Module):
    """Two layers and what happens between them; half of the channels are dead and emit what their bias says."""

    def __init__(self, call, wide=32):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.call = nn.Linear(16, wide), nn.Linear(wide, 8), call
        self.table = nn.Embedding(4, wide)
        with torch.no_grad():
            self.a.weight[: wide // 2] = 0.0
            self.a.bias[: wide // 2] = torch.linspace(0.2, 1.0, wide // 2)

    def forward(self, x, given):
        return self.b(self.call(torch.relu(self.a(x)), given, self))


def ones():
    return torch.ones(4, 6, dtype=torch.bool)


def part():
    mask = ones()
    mask[:, 3:] = False
    return mask


LENGTHS = torch.full((4,), 6)
DEPENDENT = {
    "boolean mask": (lambda h, m, _: h * m.unsqueeze(-1), ones(), part()),
    "mask that fills": (lambda h, m, _: h.masked_fill(~m.unsqueeze(-1), 0.5), ones(), part()),
    "0-1 float mask": (lambda h, m, _: h * m.unsqueeze(-1), ones().float(), part().float()),
    "additive mask": (
        lambda h, m, _: h * m.exp().unsqueeze(-1),
        torch.zeros(4, 6).index_fill(1, torch.tensor([0]), -math.inf),
        torch.zeros(4, 6).index_fill(1, torch.tensor([3, 4]), -math.inf),
    ),
    "lengths": (
        lambda h, n, _: h * (torch.arange(h.shape[1]) < n[:, None]).unsqueeze(-1),
        LENGTHS,
        torch.tensor([6, 3, 2, 1]),
    ),
    "token ids": (
        lambda h, i, m: h + m.table(i).detach(),
        torch.ones(4, 6, dtype=torch.long),
        torch.arange(24).view(4, 6) % 4,
    ),
    "padding id": (
        lambda h, i, _: h * (i != 0).unsqueeze(-1),
        torch.ones(4, 6, dtype=torch.long),
        torch.arange(24).view(4, 6) % 4,
    ),
    "indices": (lambda h, i, _: h * i.view(4, 1, 1), torch.arange(4).clamp(max=0) + 1, torch.arange(4)),
    "branch on the mask": (lambda h, m, _: h if bool(m.all()) else -h, ones(), part()),
    "branch on a count": (lambda h, n, _: h if int(n.sum()) == 24 else h + 1.0, LENGTHS, torch.tensor([6, 3, 2, 1])),
    "mask in a dict": (lambda h, g, _: h * g["mask"].unsqueeze(-1), {"mask": ones()}, {"mask": part()}),
    "mask as complex": (lambda h, m, _: h * m.abs().unsqueeze(-1), ones().cfloat(), part().cfloat()),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_depends_on_an_input_is_not_folded(name):
    call, example, other = DEPENDENT[name]
    model, x = Between(call).eval(), torch.randn(4, 6, 16)
    result = shrink(model, (x, example))
    assert CONSTANT in result.left["a"]
    with torch.no_grad():
        torch.testing.assert_close(result.model(x, other), model(x, other))


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda h, *_: h.sum(1, keepdim=True), (3, 4, 16)),
        (lambda h, *_: h / h.shape[1], (4, 9, 16)),
        (lambda h, *_: h * len(h), (2, 6, 16)),
    ],
    ids=["sum over time", "share of the length", "size of the batch"],
)
def test_what_depends_on_a_size_of_the_input_is_not_folded(call, shape):
    model = Between(call).eval()
    result = shrink(model, (torch.randn(4, 6, 16), None))
    assert CONSTANT in result.left["a"]
    with torch.no_grad():
        torch.testing.assert_close(result.model(x := torch.randn(shape), None), model(x, None))


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor
    name: str = "batch"


class Pair(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor


class Graph:
    def __init__(self, x, mask):
        self.store = {"x": x, "mask": mask}


class OfObjects(nn.Module):
    def __init__(self, named):
        super().__init__()
        self.inner, self.named = Between(lambda h, m, _: h * m.unsqueeze(-1)), named

    def forward(self, batch):
        store = batch.store if isinstance(batch, Graph) else batch
        x, mask = (store["x"], store["mask"]) if isinstance(store, dict) else (store.x, store.mask)
        y = self.inner(x, mask)
        return Batch(y, mask) if self.named else Graph(y, mask)


@pytest.mark.parametrize("kind", [Batch, Pair, Graph, lambda x, mask: {"x": x, "mask": mask}])
def test_masks_and_outputs_are_found_in_any_container(kind):
    model = OfObjects(kind is Batch).eval()
    x = torch.randn(4, 6, 16)
    result = shrink(model, kind(x, ones()))
    assert CONSTANT in result.left["inner.a"]
    assert tensors_in(kind(x, ones()))[0] is x
    with torch.no_grad():
        want, got = (tensors_in(m(kind(x, part()))) for m in (model, result.model))
    assert len(want) == 2
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b)


def test_named_arguments_are_passed_and_varied():
    class Named(Between):
        def forward(self, x, *, mask):
            return super().forward(x, mask)

    model, x = Named(lambda h, m, _: h * m.unsqueeze(-1)).eval(), torch.randn(4, 6, 16)
    assert CONSTANT in shrink(model, x, example_kwargs={"mask": ones()}).left["a"]


def test_constants_that_depend_on_no_input_are_folded_beside_masks():
    model, x = Between(lambda h, m, _: h.sigmoid()).eval(), torch.randn(4, 6, 16)
    del model.table  # nobody calls it, and it has as many channels
    result = shrink(model, (x, ones()))
    assert result.model.a.out_features == 16
    with torch.no_grad():
        torch.testing.assert_close(result.model(x, part()), model(x, part()))


def test_input_that_a_model_lets_nobody_vary_keeps_constants_where_they_are():
    def only_ones(h, mask, _):
        if not bool(mask.all()):
            raise ValueError("not this one")
        return h * mask.unsqueeze(-1)

    result = shrink(Between(only_ones).eval(), (torch.randn(4, 6, 16), ones()))
    assert "may depend on an input of bool and shape (4, 6), which can not be varied" in result.left["a"]


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_outputs_that_are_not_finite_hide_no_difference(value):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
            with torch.no_grad():
                self.b.weight[:, :16] = 0.0

        def forward(self, x, mask):
            return self.b(torch.softmax(self.a(x), -1)).masked_fill(mask, value)

    model, x, mask = Hiding().eval(), torch.randn(4, 16), torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 0] = True
    result = shrink(model, (x, mask))
    assert result.model.a.out_features == 32
    with torch.no_grad():
        torch.testing.assert_close(result.model(x, mask), model(x, mask), equal_nan=True)


def test_difference_is_taken_place_by_place():
    inf, nan = math.inf, math.nan
    a = torch.tensor([1.0, inf, -inf, nan])
    assert difference(a, a.clone()) == 0.0
    assert difference(a, torch.tensor([1.5, inf, -inf, nan])) == 0.5
    for other in ([1.0, -inf, -inf, nan], [1.0, inf, -inf, 0.0], [nan, inf, -inf, nan], [inf, inf, -inf, nan]):
        assert difference(a, torch.tensor(other)) == inf
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == inf
    assert difference(torch.tensor([True]), torch.tensor([True])) == 0.0
    assert difference(torch.tensor([1j]), torch.tensor([2j])) == 1.0
    assert difference(a, a[:2]) == inf


class Noting(nn.Module):
    """Writes down how often it was called, and draws random numbers, in evaluation as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", None)
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()
        self.seen.append(len(x))
        return self.b(self.a(x).relu()) + 0.1 * torch.rand(3)


def test_looking_at_a_model_leaves_no_trace_in_it():
    torch.manual_seed(0)
    model = Noting()
    with torch.no_grad():
        model.a.weight[:2] = 0.0
    state = torch.get_rng_state()
    result = shrink(model, torch.randn(5, 4))
    for m in (model, result.model):
        assert int(m.calls) == 0
        assert m.last is None
        assert m.seen == []
    assert result.model.a.out_features == 4
    torch.manual_seed(0)
    torch.randn(5, 4)
    state = torch.get_rng_state()
    shrink(model, torch.zeros(5, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_of_other_seeds_differ_and_the_example_comes_first():
    args = (torch.randn(3, 4), torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool))
    first, second = (make_probes(args, {}, lambda inputs: None, seed).inputs for seed in (1, 2))
    assert first[0][0] is args
    assert len(first) >= 6
    assert not torch.equal(first[1][0][0], second[1][0][0])
    assert any(not bool(inputs[0][2].all()) for inputs in first)
    assert any(len(inputs[0][0]) == 2 for inputs in first)


def test_one_tensor_in_two_places_stays_one():
    x = torch.zeros(2)
    copied = with_tensors({"a": [x], "b": Graph(x, None)}, lambda t: t + 1)
    assert copied["a"][0] is copied["b"].store["x"]
    assert float(copied["a"][0][0]) == 1.0
    assert float(x[0]) == 0.0
