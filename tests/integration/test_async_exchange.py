"""Layers and parameters that are replaced while asynchronous workers train, seen from the store."""

import torch
from async_workers import run_thread_workers
from torch import nn

from lightning_accel.async_sgd import Worker


def exchanging(store, results):
    """Two workers; the first replaces the model's layer after its fourth push, the other one follows."""
    model = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    worker = Worker(store, store.settings, {"weight": model.weight}, {}, [optimizer])
    worker.join(worker.opening)
    worker.attach()
    layers = {"weight": model.weight}

    def step():
        for parameter in layers.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    def replace(values):
        layers.clear()
        layers.update({name: nn.Parameter(value.clone()) for name, value in values.items()})
        optimizer.param_groups[0]["params"] = list(layers.values())
        worker.follow(dict(layers), {})

    step()
    store.kv(f"stepped {store.worker}", b"yes")
    store.kv(f"stepped {1 - store.worker}")
    if store.worker == 0:
        cut = store.hold()
        store.kv("held", b"yes")
        results["held"] = cut.parameters[0]
        replace({"out": torch.zeros(2, 1), "in": torch.zeros(1, 4)})
        store.exchange(worker.opening(version=cut.version, steps=cut.steps))
        worker.begin()
        store.kv("exchanged", b"yes")
    else:
        store.kv("held")
        model.weight.grad = torch.full_like(model.weight, 7.0)
        late = store.push([model.weight.grad], optimizer=0)  # waits while held, and is of a layer that is no more
        store.kv("exchanged")
        results["late"] = store.wait_for(late)
        results["current"] = store.is_current
        store.rejoin()
        results["names"] = store.parameter_names
        replace({"out": torch.zeros(2, 1), "in": torch.zeros(1, 4)})
        store.check(list(layers.values()), [])
        worker.begin()
    step()
    store.kv(f"again {store.worker}", b"yes")
    store.kv(f"again {1 - store.worker}")


def test_layers_exchanged_by_one_worker_reach_server_and_others_and_old_gradients_do_not():
    results = {}
    ending = run_thread_workers(2, lambda store: exchanging(store, results), staleness="none")
    assert torch.equal(results["held"], torch.full((2, 4), -2.0))
    assert results["late"] is False
    assert results["current"] is False
    assert results["names"] == ending.state.names == ["out", "in"]
    assert [p.shape for p in ending.state.parameters] == [(2, 1), (1, 4)]
    assert all(torch.equal(p, torch.full_like(p, -2.0)) for p in ending.state.parameters)
    assert ending.statistics.refused == 1
    assert ending.statistics.version == 4


def changing(store, values):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    worker = Worker(store, store.settings, {"p": parameter}, {}, [optimizer], watch=True)
    worker.join(worker.opening)
    worker.attach()
    with torch.no_grad():
        parameter.fill_(5.0)  # between two steps
    parameter.grad = torch.ones(2)
    optimizer.step()
    values.append(parameter.detach().clone())


def test_what_is_made_of_parameters_between_steps_counts():
    values = []
    ending = run_thread_workers(1, lambda store: changing(store, values))
    assert torch.equal(values[0], torch.full((2,), 4.0))
    assert torch.equal(ending.snapshot.parameters[0], values[0])
