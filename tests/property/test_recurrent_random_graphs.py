"""Random graphs: the schedule's outputs and gradients equal the plain loop's, which is the oracle."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_errors import relative_errors

from lightning_accel.recurrent import GraphRNN
from lightning_accel.recurrent.compiler import executor
from lightning_accel.recurrent.graph import strongly_connected_components

ACTIVATIONS = ["linear", "sigmoid", "tanh", "softplus", "one_minus"]
LIMIT = 1e-12  # of the largest entry of each tensor


@st.composite
def graphs(draw):
    """Nodes in a line: edges without delay lead onwards, delayed ones anywhere."""
    size, count = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    names = [f"n{k}" for k in range(count)]
    nodes = {"x": {"size": size}, "one": {"size": 1}}
    edges = ["x -> one"]
    for k, name in enumerate(names):
        product = draw(st.booleans())
        nodes[name] = {
            "size": size,
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "aggregation": "product" if product else "sum",
            "bias": not product and draw(st.booleans()),
        }
        edges.append(f"{draw(st.sampled_from(['x', *names[:k]]))} -> {name}")
        for _ in range(draw(st.integers(0, 2))):
            kind = draw(st.sampled_from(["full", "diagonal", "identity"]))
            delay = draw(st.integers(0, 3))
            source = draw(st.sampled_from(names if delay else ["x", *names[:k]]))
            edges.append(f"{source} -> {name} delay={delay} {kind}")
    if draw(st.booleans()):
        edges.append(f"one -> {names[-1]} broadcast")
    return nodes, edges, ["x"], draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.integers(1, 6), st.integers(1, 4))
def test_random_graphs_equal_the_loop(arguments, steps, streams):
    torch.manual_seed(0)
    loop = GraphRNN(*arguments, schedule="loop").double()
    fast = GraphRNN(*arguments, schedule="intra_stream").double()
    fast.load_state_dict(loop.state_dict())
    x = torch.randn(steps, streams, loop.input_size, dtype=torch.double, requires_grad=True)
    found = []
    for rnn in (loop, fast):
        y, last = rnn(x)
        total = y.cos().sum() + sum((k + 2.0) * s.sin().sum() for k, s in enumerate(last))
        gradients = torch.autograd.grad(total, [x, *rnn.parameters()], allow_unused=True)
        values = {f"result {k}": r for k, r in enumerate([y, *last])}
        found.append(values | dict(zip(["x", *(n for n, _ in rnn.named_parameters())], gradients, strict=True)))
    errors = relative_errors(found[1], found[0])
    assert max(errors.values()) <= LIMIT, errors
    assert set(fast.rnn.schedules[0].choices.values()) == {"intra_stream"}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.integers(2, 4), st.integers(1, 3))
def test_random_graphs_as_triton_kernels_equal_the_loop(arguments, steps, streams):
    torch.manual_seed(0)
    loop = GraphRNN(*arguments, schedule="loop").double()
    fast = GraphRNN(*arguments, schedule="compiled").double()
    fast.load_state_dict(loop.state_dict())
    x = torch.randn(steps, streams, loop.input_size, dtype=torch.double, requires_grad=True)
    found = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a graph without a loop has nothing to compile
        patch.setattr(executor, "language_of", lambda device: "Triton")
        for rnn in (loop, fast):
            y, last = rnn(x)
            total = y.cos().sum() + sum((k + 2.0) * s.sin().sum() for k, s in enumerate(last))
            gradients = torch.autograd.grad(total, [x, *rnn.parameters()], allow_unused=True)
            found.append(
                {f"result {k}": r for k, r in enumerate([y, *last])} | {f"d {k}": g for k, g in enumerate(gradients)}
            )
    errors = relative_errors(found[1], found[0])
    assert max(errors.values()) <= LIMIT, errors
    delayed = any("delay=0" not in e and "delay=" in e for e in arguments[1])
    compiled = set(fast.rnn.schedules[0].choices.values()) == {"compiled"}
    assert compiled or not delayed or "it has none" in str(fast.rnn.schedules[0].refusals)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=25))
def test_components_are_what_reachability_says(arrows):
    following = {n: [b for a, b in arrows if a == n] for n in range(8)}
    reached = {}
    for n in range(8):
        seen, stack = {n}, [n]
        while stack:
            for m in following[stack.pop()]:
                if m not in seen:
                    seen.add(m)
                    stack.append(m)
        reached[n] = seen
    components = strongly_connected_components(range(8), following.__getitem__)
    expected = {frozenset(m for m in range(8) if m in reached[n] and n in reached[m]) for n in range(8)}
    assert {frozenset(c) for c in components} == expected
    home = {n: k for k, c in enumerate(components) for n in c}
    assert all(home[a] <= home[b] for a, b in arrows)
