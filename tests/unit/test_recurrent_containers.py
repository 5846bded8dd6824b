"""Containers that a cell holds: written down in one piece, and any change of them counts."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_accel.recurrent import Edge, Node, Recurrent
from lightning_accel.recurrent.exactness.assumptions import assumptions_of, first_change
from lightning_accel.recurrent.exactness.containers import fixed_contents, numbers_of, plain_contents


@pytest.mark.parametrize(
    ("value", "others"),
    [
        ([1, 2], [[2, 1], (1, 2), [1.0, 2], [True, 2], [1, 2, None], ["1", 2]]),
        ({"a": [0.0]}, [{"a": [-0.0]}, {"a": (0.0,)}, {"b": [0.0]}, {"a": [0]}]),
        ({1: "a", 2: "b"}, [{2: "b", 1: "a"}]),
        ((1 + 0j, b"x"), [(1.0, b"x"), (1 + 0j, "x")]),
        ([], [(), {}]),
        ([float("nan")], [[float("inf")]]),
    ],
)
def test_equal_contents_are_of_equal_types_and_bits(value, others):
    found = plain_contents(value)
    assert found is not None
    assert found == plain_contents(copy.deepcopy(value))
    assert all(plain_contents(other) not in (None, found) for other in others)


def test_other_objects_and_large_containers_are_walked_through():
    holds_itself = [1]
    holds_itself.append(holds_itself)
    for value in (
        [torch.ones(1)], [np.ones(1)], {1: nn.Identity()}, [1, [object()]], torch.Size([1]), "text", 3, {1}, [{1}],
        [0] * 1_001, [10**5_000], holds_itself, {(1, torch.float32): 1}, [Node("a", 1)],
    ):  # fmt: skip
        assert plain_contents(value) is None


def test_frozen_objects_count_by_identity():
    node, edge = Node("a", 1), Edge("a", "a", delay=1)
    assert fixed_contents([node, edge]) == fixed_contents([node, edge])
    assert fixed_contents({"a": node}) == fixed_contents({"a": node})
    others = [(node, edge), [edge, node], [node], {"b": node}, {"a": node}, [copy.copy(node), edge]]
    assert len({fixed_contents(value) for value in ([node, edge], *others)}) == 1 + len(others)
    for value in ([], {}, [node, 1], {"a": node, "b": nn.Identity()}, {node: node}, [node] * 1_001):
        assert fixed_contents(value) is None


def test_small_tensors_count_by_their_numbers_and_all_by_their_place():
    small, large = torch.ones(3), torch.ones(2**15)
    known = numbers_of(small), numbers_of(large)
    small.data.mul_(2.0)
    large.data.mul_(2.0)
    assert numbers_of(small) != known[0]
    assert numbers_of(large) == known[1], "64 KiB are looked at"
    large.data = large.data.clone()
    assert numbers_of(large) != known[1]
    assert numbers_of(torch.ones(0)) is not None
    large.untyped_storage().resize_(0)
    small.untyped_storage().resize_(0)  # as sharded training does with what it has no use for now
    assert numbers_of(small) == numbers_of(large) == (0, b"")
    found = []
    torch.func.vmap(lambda x: found.append(numbers_of(x)) or x)(torch.ones(3))
    found += map(numbers_of, (torch.ones(2, 2).t(), torch.ones(2).to_sparse(), torch.ones(2, device="meta")))
    assert found == [None] * 4


class Configured(nn.Module):
    """Does what lists and dictionaries of its say."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.weights, self.kinds = {"x": [1.0, 2.0]}, ["tanh"]

    def initial_state(self, x):
        return (x.new_zeros(len(x), 3),)

    def forward(self, x, state):
        h = self.weights["x"][0] * self.a(x) + self.weights["x"][1] * state[0]
        for kind in self.kinds:
            h = getattr(torch, kind)(h)
        return h, (h,)


def change_number(cell):
    cell.weights["x"][1] = 0.5


def add_number(cell):
    cell.weights["x"][0] = 3.0
    cell.weights["y"] = [7.0]


def change_kind(cell):
    cell.kinds.append("sin")


@pytest.mark.parametrize("change", [change_number, add_number, change_kind])
def test_a_change_within_a_container_counts(change):
    torch.manual_seed(0)
    rnn = Recurrent(Configured(), schedule="intra_stream")
    x = torch.randn(5, 2, 3)
    before = rnn(x)[0]
    known = assumptions_of(rnn.cell)
    assert known.key == assumptions_of(rnn.cell).key
    change(rnn.cell)
    assert known.key != assumptions_of(rnn.cell).key
    assert first_change(rnn.cell, known) in ("`weights`", "`kinds`")
    loop = copy.deepcopy(rnn)
    loop.schedules[0].schedule = "loop"
    torch.testing.assert_close(rnn(x)[0], loop(x)[0])
    assert not torch.equal(rnn(x)[0], before)
