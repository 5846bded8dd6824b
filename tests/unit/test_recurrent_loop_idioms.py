"""What people do with the steps of a loop that is computed at its first call: all is as in the plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_accel.recurrent.deferred.find_cells import DeferredCells

T, B, F, H = 8, 2, 4, 4


class Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


ste = Ste.apply


@torch.jit.script
def gated(h: torch.Tensor) -> torch.Tensor:
    return torch.tanh(h) * h


class Model(nn.Module):
    """Runs ``use(model, x)``, which returns a loss and may note numbers."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.upper = nn.LSTMCell(F, H), nn.GRUCell(H, H)
        self.embed = nn.Linear(F, F)
        self.double()
        self.use, self.noted = use, []

    def forward(self, x):
        return self.use(self, x)

    def note(self, value):
        self.noted.append(0.0 if value is None else value.detach().abs().sum().item())


def unroll(model, x, *, each=None):
    state, hidden = None, []
    for t, step in enumerate(x):
        state = model.cell(step, state)
        if each is not None:
            state = each(t, state)
        hidden.append(state[0])
    return hidden


def stacked(model, x, *, between=lambda h: h):
    lower, upper, hidden = None, x.new_zeros(B, H), []
    for step in x:
        lower = model.cell(step, lower)
        upper = model.upper(between(lower[0]), upper)
        hidden.append(upper)
    return hidden, lower


def with_hooks(listen):
    def use(model, x):
        hidden = unroll(model, x)
        listen(model, hidden)
        return torch.stack(hidden).sin().sum()

    return use


def retained(model, x):
    hidden = unroll(model, x)
    hidden[2].retain_grad()
    loss = torch.stack(hidden).sin().sum()
    loss.backward(retain_graph=True)
    model.note(hidden[2].grad)
    return loss


def saliency(model, x):
    hidden = unroll(model, x)
    loss = torch.stack(hidden).sin().sum()
    model.note(torch.autograd.grad(loss, hidden[3], retain_graph=True)[0])
    return loss


def slice_saliency(model, x):
    z = x.detach().clone().requires_grad_()
    slices = list(z.unbind(0))
    loss = torch.stack(unroll(model, slices)).sin().sum()
    for gradient in torch.autograd.grad(loss, [slices[0], slices[3], z], retain_graph=True):
        model.note(gradient)
    return loss


def hooked_input(model, x):
    z = model.embed(x.transpose(0, 1)).transpose(0, 1)
    z.register_hook(lambda g: -g)
    return unroll(model, z)[-1].square().sum()


def hooked_slice(model, x):
    slices = list(model.embed(x))
    hidden = unroll(model, slices)
    slices[2].register_hook(lambda g: model.note(g))
    return hidden[-1].square().sum()


def penalty(model, x):
    hidden = unroll(model, x)
    (gradient,) = torch.autograd.grad(hidden[-1].square().sum(), hidden[1], create_graph=True)
    return hidden[-1].sum() + gradient.square().sum()


def second_derivative(model, x):
    hidden = unroll(model, model.embed(x))
    found = torch.autograd.grad(hidden[-1].square().sum(), list(model.cell.parameters()), create_graph=True)
    return sum(g.square().sum() for g in found)


def inner_step(model, x):
    own = dict(model.named_parameters())
    loss = unroll(model, x)[-1].square().sum()
    found = torch.autograd.grad(loss, list(own.values()), create_graph=True, allow_unused=True)
    moved = {n: p if g is None else p - 0.5 * g for (n, p), g in zip(own.items(), found, strict=True)}
    return functional_call(_Last(model), {f"model.{n}": p for n, p in moved.items()}, (x,)).square().sum()


class _Last(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return unroll(self.model, x)[-1]


def data_assigned(model, x):
    hidden, buffer = unroll(model, x), torch.zeros(B, H)
    buffer.data = hidden[-1].data
    model.note(buffer)
    return hidden[-1].square().sum()


def masked_stack(model, x):
    hidden = unroll(model, x)
    y = torch.stack(hidden)
    with torch.no_grad():
        y *= (torch.arange(T) < 4).double()[:, None, None]
        model.note(y)
    return hidden[6].square().sum() + hidden[-1].sum()


def relu_in_place(model, x):
    return nn.functional.relu(torch.stack(unroll(model, x)), inplace=True).square().sum()


def written_into(model, x):
    kept = x.new_zeros(T, B, H)
    for t, h in enumerate(unroll(model, x)):
        kept[t] = h
    return kept.sin().sum()


def numpy_buffer(model, x):
    buffer = torch.zeros(B, F, dtype=torch.double).numpy()
    step, state = torch.from_numpy(buffer), None
    for s in x:
        buffer[:] = s.detach().numpy()
        state = model.cell(step, state)
    return state[0].square().sum()


def nan_tail(model, x):
    y = torch.cat([x.detach(), torch.full_like(x.detach(), float("nan"))])
    state, hidden = None, []
    for t in range(T):
        state = model.cell(y[t], state)
        hidden.append(state[0])
    return torch.stack(hidden).sin().sum()


def some_only(model, x):
    return unroll(model, x)[2].sin().sum()


def checkpointed(model, x):
    return checkpoint(lambda x: unroll(model, x)[-1].square().sum(), x, use_reentrant=False)


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return unroll(model, x)[-1].square().sum()


def twice_backward(model, x):
    loss = torch.stack(unroll(model, model.embed(x))).sin().sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    return loss


def stepwise_inputs_with_hooks(model, x):
    hidden, lower = stacked(model, x, between=lambda h: _heard(model, h))
    return torch.stack(hidden).sin().sum() + lower[1].sum()


def _heard(model, h):
    if h.requires_grad:
        h.register_hook(lambda g: model.note(g))
    return h


def late_hooks_of_the_lower_loop(model, x):
    seen = []
    hidden, _ = stacked(model, x, between=lambda h: seen.append(h) or h)
    seen[2].register_hook(lambda g: 2 * g)
    return torch.stack(hidden).sin().sum()


def kept(model, x):
    h = unroll(model, x)[-1]
    model.note(nn.Parameter(h))
    return h.square().sum()


def mask(t, state):
    keep = torch.tensor([[1.0], [0.0 if t > 4 else 1.0]], dtype=torch.double)
    return tuple(torch.where(keep > 0, s, s.detach() * 0.5) for s in state)


USES = {
    "hooks in the loop": lambda m, x: torch.stack(
        unroll(m, x, each=lambda t, s: (s[0].register_hook(lambda g: 2 * g), s)[1] if t == 3 else s)
    ).sum(),
    "hooks after the loop": with_hooks(lambda m, hidden: hidden[3].register_hook(lambda g: 2 * g)),
    "hooks that listen": with_hooks(lambda m, hidden: [h.register_hook(lambda g: m.note(g)) for h in hidden]),
    "hooks on nodes": with_hooks(lambda m, hidden: hidden[3].grad_fn.register_prehook(lambda gs: m.note(gs[0]))),
    "hooks behind nodes": with_hooks(lambda m, hidden: hidden[3].grad_fn.register_hook(lambda i, o: m.note(o[0]))),
    "hooks on many": with_hooks(lambda m, hidden: register_multi_grad_hook(hidden, lambda gs: [m.note(g) for g in gs])),
    "retain_grad": retained,
    "gradient of a hidden state": saliency,
    "gradient of slices": slice_saliency,
    "hook on a transposed input": hooked_input,
    "hook on a slice": hooked_slice,
    "gradient penalty": penalty,
    "second derivative": second_derivative,
    "MAML": inner_step,
    "bound function": lambda m, x: (ste(unroll(m, x)[-1]) * 3 - 1).square().sum(),
    "TorchScript": lambda m, x: gated(unroll(m, x)[-1]).sum(),
    "nn.Parameter": kept,
    "data assigned": data_assigned,
    "mask of the stack in place": masked_stack,
    "relu of the stack in place": relu_in_place,
    "written into a tensor": written_into,
    "stack with out": lambda m, x: (
        torch.stack([h.detach() for h in unroll(m, x)], out=x.new_empty(0).detach()).sum() + unroll(m, x)[-1].sum()
    ),
    "views": lambda m, x: torch.stack([h.view(-1)[:3] for h in unroll(m, x)]).sin().sum(),
    "numpy buffer": numpy_buffer,
    "NaN behind the last step": nan_tail,
    "an inner step only": some_only,
    "checkpoint": checkpointed,
    "offloading": offloaded,
    "two backwards": twice_backward,
    "two stacked cells": lambda m, x: torch.stack(stacked(m, m.embed(x))[0]).sin().sum(),
    "hooks between stacked cells": stepwise_inputs_with_hooks,
    "late hooks between stacked cells": late_hooks_of_the_lower_loop,
    "masked state": lambda m, x: unroll(m, x, each=mask)[-1].sum(),
    "vmap": lambda m, x: torch.func.vmap(lambda h: h.square().sum())(unroll(m, x)[-1]).sum(),
    "copies": lambda m, x: (h := unroll(m, x))[-1].sum() + copy.deepcopy(h[2].detach()).sum(),
    "both directions": lambda m, x: (unroll(m, x)[-1] * unroll(m, x.flip(0))[-1] + unroll(m, list(x)[::-1])[-1]).sum(),
    "frozen cell": lambda m, x: unroll(m.requires_grad_(False), x)[-1].square().sum(),
}


def step(model, x, *, whole):
    """Return loss, gradients and notes of a training step; ``whole`` makes a usual backward."""
    model.noted = []
    for p in (*model.parameters(), x):
        p.grad = None
    loss = model(x)
    wanted = [t for t in (*model.parameters(), x) if t.requires_grad]
    if whole:
        loss.backward()
        return loss.detach(), [t.grad for t in wanted], model.noted
    return loss.detach(), list(torch.autograd.grad(loss, wanted, allow_unused=True)), model.noted


def sequence():
    torch.manual_seed(1)
    return torch.randn(T, B, F, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("whole", [True, False], ids=["backward", "grad"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_loss_gradients_and_what_is_noted_are_those_of_the_plain_loop(use, whole):
    model, x = Model(use), sequence()
    expected = step(model, x, whole=whole)
    cells = DeferredCells(model, "native")
    with cells.watch():
        step(model, x, whole=whole)
    for _ in range(2):
        with cells.active():
            actual = step(model, x, whole=whole)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(actual[2], expected[2], rtol=1e-10, atol=1e-12)
        for found, wanted in zip(actual[1], expected[1], strict=True):
            assert (found is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    cells.remove()
    assert all("forward" not in m.__dict__ for m in model.modules())


def read_twice(model, x):
    state = None
    for part in (*x, *x):
        state = model.cell(part, state)
    return state[0].square().sum()


def test_a_loop_that_reads_its_input_twice_is_foretold_to_the_end_of_it():
    model, x = Model(read_twice), sequence()
    expected = step(model, x, whole=True)
    cells = DeferredCells(model, "native")
    with cells.watch():
        step(model, x, whole=True)
    for _ in range(2):
        with cells.active():
            actual = step(model, x, whole=True)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
        found, wanted = ([g for g in gradients if g is not None] for gradients in (actual[1], expected[1]))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert not cells.cells["cell"].reason
    assert cells.cells["cell"].steps == 2 * T
