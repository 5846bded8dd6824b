"""Leases, compression and the server of asynchronous SGD under arbitrary orders of events."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_accel.async_sgd import Compression, LeaseBook, ParameterServer, Push, Settings, replay
from lightning_accel.async_sgd.policy.encoding.compression import ErrorFeedback
from lightning_accel.async_sgd.store import Opening

EVENTS = st.lists(st.tuples(st.sampled_from(["grant", "commit", "die", "drop"]), st.integers(0, 2)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, block=st.integers(1, 4), units=st.integers(0, 12))
def test_every_unit_is_committed_once_whatever_happens(events, block, units):
    book = LeaseBook(block=block)
    book.begin(0, [f"unit {i}" for i in range(units)])
    held = {worker: [] for worker in range(3)}
    committed = []

    def commit(worker):
        lease = held[worker].pop(0)
        assert lease.unit == f"unit {lease.position}"
        book.commit(worker, [lease.id])
        committed.append(lease.position)

    for event, worker in events:
        if event == "grant":
            held[worker] += book.grant(worker, 0, workers=3)
        elif event == "die":
            assert book.revoke(worker) == len(held[worker])
            held[worker].clear()
        elif held[worker]:
            if event == "commit":
                commit(worker)
            else:
                book.give_back(worker, [held[worker].pop(0).id])
        others = sum(len(leases) for other, leases in held.items() if other != worker)
        assert book.held_by_others(worker, 0) == others
        assert book.remaining() == units - len(committed)
    for worker in (1, 2):
        book.revoke(worker)
    while block_of_last := book.grant(0, 0):
        held[0] += block_of_last
    while held[0]:
        commit(0)
    assert sorted(committed) == list(range(units))
    assert book.remaining() == 0


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["fp16", "int8", "topk"]),
    values=st.lists(st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), min_size=1, max_size=8),
)
def test_what_was_received_and_what_is_kept_add_up_to_what_was_given(name, values):
    compression = Compression(name, kept=0.4)
    feedback = ErrorFeedback(compression)
    area = torch.zeros(compression.nbytes(6, torch.float64), dtype=torch.uint8)
    received = torch.zeros(6, dtype=torch.float64)
    for row in values:
        feedback.write(0, torch.tensor(row, dtype=torch.float64), area)
        received += compression.read(area, shape=torch.Size([6]), dtype=torch.float64)
    given_in_all = torch.tensor(values, dtype=torch.float64).sum(0)
    assert torch.allclose(received + feedback._errors[0], given_in_all, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    pushes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.booleans()), max_size=12),
    rule=st.sampled_from(["none", "inverse", "drop"]),
)
def test_any_order_of_pushes_replays_bit_for_bit(pushes, rule):
    def fresh():
        parameters = [nn.Parameter(torch.linspace(-1, 1, 3)), nn.Parameter(torch.ones(2))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    def gradient_of(entry, at):
        return [torch.sin(at[0] + entry.worker), torch.cos(at[1]) * entry.sequence]

    parameters, optimizer = fresh()
    chosen = Settings(staleness=rule, drop_beyond=1, record_log=True)
    server = ParameterServer(Opening(["a", "b"], parameters, [], [], [optimizer]), chosen)
    history = {0: [p.detach().clone() for p in parameters]}
    sequences = [0, 0]
    for worker in (0, 1):
        server.admit(worker, 0)
    for worker, behind, finite in pushes:
        sequences[worker] += 1
        base = max(0, server.version - behind)
        entry = Push(worker, 0, sequences[worker], base, 0, [], finite=finite)
        entry.gradients = gradient_of(entry, history[base])
        before = server.version
        outcome = server.apply(entry)
        assert server.version == before + (outcome == "applied")
        history[server.version] = [p.detach().clone() for p in server.parameters]
    again, optimizer = fresh()
    replay(server.log, again, [optimizer], gradient_of)
    assert all(torch.equal(a, b) for a, b in zip(again, server.parameters, strict=True))
