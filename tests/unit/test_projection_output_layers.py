"""Which layers write the output is read off the graph of a step, whatever the layers are called."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_accel.projection.training.output_layers import OutputLayers, has_matrices
from lightning_accel.projection.training.targets import find_targets


def found(model, step, groups=None):
    """Return the names that write the output, and those that do not."""
    targets = find_targets(model, module_types=("Linear", "Conv2d"))
    watch = OutputLayers(model)
    watch.note_loss(step(model))
    trained = []
    for modules in groups or [[model]]:
        mine = {m for module in modules for m in module.modules() if has_matrices(m)}
        trained.append((mine, [t for t in targets if t.module in mine]))
    roles = watch.sort_out(trained)
    watch.stop()
    assert not any(module._forward_hooks for module in model.modules())
    return {n for n, writes in roles.items() if writes}, {n for n, writes in roles.items() if not writes}


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_names_say_nothing():
    model = Net(head=nn.Linear(8, 6), body=nn.Linear(6, 3))
    writes, hidden = found(model, lambda m: m.body(m.head(x).relu()).sum())
    assert (writes, hidden) == ({"body.weight"}, {"head.weight"})


@pytest.mark.parametrize("last", [nn.BatchNorm1d(3), nn.LayerNorm(3), nn.PReLU(3), nn.Softmax(1)])
def test_norms_and_activations_behind_the_last_layer_change_nothing(last):
    model = Net(a=nn.Linear(8, 6), b=nn.Linear(6, 3), last=last)
    assert found(model, lambda m: m.last(m.b(m.a(x).relu())).square().sum())[0] == {"b.weight"}


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))


class Decoder(nn.Module):
    """Has its weights in a part that is never called, as libraries of filter banks do."""

    def __init__(self):
        super().__init__()
        self.bank = Bank()

    def forward(self, h):
        return h @ self.bank.weight


def test_layer_before_one_whose_weights_are_in_a_part_is_hidden():
    model = Net(masker=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), decoder=Decoder())
    writes, hidden = found(model, lambda m: functional.mse_loss(m.decoder(m.masker(x).sigmoid()), x))
    assert (writes, hidden) == (set(), {"masker.0.weight", "masker.2.weight"})


def equation(m):
    """Squared derivatives of the output, first and second ones, as solvers of equations have them."""
    points = x.clone().requires_grad_()
    y = m.c(m.b(m.a(points).tanh()).tanh())
    (first,) = torch.autograd.grad(y.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), points, create_graph=True)
    return (second - y).square().mean() + first.square().mean()


def forces(m):
    points = x.clone().requires_grad_()
    energy = m.c(torch.nn.functional.silu(m.b(m.a(points).tanh()))).sum()
    return torch.autograd.grad(energy, points, create_graph=True)[0].square().mean()


def gradient_penalty(m):
    points = x.clone().requires_grad_()
    scores = m.c(m.b(m.a(points).tanh()).tanh())
    slope = torch.autograd.grad(scores.sum(), points, create_graph=True)[0].norm(dim=1)
    return scores.mean() + 10.0 * (slope - 1.0).square().mean()


@pytest.mark.parametrize("step", [equation, forces, gradient_penalty])
def test_loss_of_derivatives_makes_no_hidden_layer_an_output(step):
    model = Net(a=nn.Linear(8, 6), b=nn.Linear(6, 5), c=nn.Linear(5, 1))
    assert found(model, step) == ({"c.weight"}, {"a.weight", "b.weight"})


def test_plain_backward_pass_before_the_loss_is_no_differentiation():
    model = Net(generator=nn.Linear(8, 6), critic=nn.Linear(6, 1))

    def step(m):
        m.critic(m.generator(x).tanh()).sum().backward()  # another optimizer's loss, earlier in the step
        return m.generator(x).square().sum()

    writes, _ = found(model, step)
    assert "generator.weight" in writes


def test_several_outputs_are_all_left_alone():
    model = Net(trunk=nn.Linear(8, 6), mean=nn.Linear(6, 2), spread=nn.Linear(6, 2), decoder=nn.Linear(2, 8))

    def step(m):
        h = m.trunk(x).relu()
        mean, spread = m.mean(h), m.spread(h)
        return functional.mse_loss(m.decoder(mean + spread.exp() * 0.1), x) + mean.square().sum() + spread.exp().sum()

    writes, hidden = found(model, step)
    assert writes == {"mean.weight", "spread.weight", "decoder.weight"}
    assert hidden == {"trunk.weight"}


def test_residual_streams_end_at_the_head():
    model = Net(a=nn.Linear(8, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 2))

    def step(m):
        h = x
        for layer in (m.a, m.b, m.a):
            h = h + layer(h).relu()
        return m.head(h).sum()

    assert found(model, step) == ({"head.weight"}, {"a.weight", "b.weight"})


def test_weights_that_are_read_by_another_module_are_found():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    inside = Net(attention=attention, head=nn.Linear(8, 2))
    steps = torch.randn(2, 3, 8)
    writes, hidden = found(inside, lambda m: m.head(m.attention(steps, steps, steps)[0]).sum())
    assert (writes, hidden) == ({"head.weight"}, {"attention.out_proj.weight"})
    last = Net(first=nn.Linear(8, 8), attention=copy.deepcopy(attention))
    writes, hidden = found(last, lambda m: m.attention(*[m.first(steps)] * 3)[0].sum())
    assert (writes, hidden) == ({"attention.out_proj.weight"}, {"first.weight"})


def test_a_weight_that_is_used_as_a_function_writes_the_output_itself():
    model = Net(first=nn.Linear(8, 6), table=nn.Linear(6, 5))
    assert "table.weight" in found(model, lambda m: functional.linear(m.first(x), m.table.weight).sum())[0]


def test_what_lies_behind_a_discriminator_or_a_frozen_critic_writes_the_output():
    generator = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    critic = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    model = Net(generator=generator, critic=critic)
    writes, hidden = found(model, lambda m: m.critic(m.generator(x)).sum(), [[generator], [critic]])
    assert writes == {"generator.2.weight", "critic.2.weight"}
    assert hidden == {"generator.0.weight", "critic.0.weight"}


def test_what_the_models_own_forward_returns_is_its_output():
    class Embedder(nn.Sequential):
        def forward(self, inputs):
            return {"embedding": self[1](self[0](inputs))}

    model = Embedder(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    writes, hidden = found(model, lambda m: m[2](m(x)["embedding"]).sum())
    assert writes == {"1.weight", "2.weight"}
    assert hidden == {"0.weight"}


def test_without_a_loss_loose_ends_count():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    targets = find_targets(model)
    watch = OutputLayers(model)
    h = model[0](x)
    model[2](h.relu())
    assert watch.sort_out([({model[0], model[2]}, targets)]) == {"0.weight": False, "2.weight": True}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_watched_model_are_not_watched(duplicate):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    watch = OutputLayers(model)
    loss = model(x).sum()
    again = duplicate(model)
    again(x).sum().backward()
    watch.note_loss(loss)
    targets = find_targets(model)
    assert watch.sort_out([(set(model), targets)]) == {"0.weight": False, "1.weight": True}
