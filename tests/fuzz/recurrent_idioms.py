"""What modules do with the results of a loop's steps: between the steps, to collect them, and behind the loop."""

import copy

import torch
from recurrent_cells import map_state, tensors_of
from torch import nn


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


def between(module, what, t, s, *, out, state):
    """Do something to a step's output and state."""
    if what == "mask where":
        keep = (s[:, :1] > -0.5).detach()
        state = map_state(lambda v: torch.where(keep, v, torch.zeros_like(v)), state)
    elif what == "mask times":
        state = map_state(lambda v: v * (s[:, :1] > -0.5).to(v.dtype), state)
    elif what == "in place" and t == 3:
        tensors_of(state)[0].mul_(0.5)
    elif what == "detach" and t % 4 == 3:
        state = map_state(torch.Tensor.detach, state)
    elif what == "hook" and t == 2 and out.requires_grad:
        out.register_hook(lambda g: g * 2)
    elif what == "retain" and t == 2 and out.requires_grad:
        out.retain_grad()
        module.retained = out
    elif what == "data write" and t == 2:
        tensors_of(state)[0].data.mul_(0.5)
    elif what == "numpy write" and t == 2:
        tensors_of(state)[0].detach().numpy()[:] *= 0.5
    elif what == "clone" and t == 4:
        state = map_state(torch.clone, state)
    elif what == "weight write" and t == 3:
        with torch.no_grad():
            next(iter(module.cells[0].parameters())).data *= 1.0
    elif what == "watch value":
        module.noted.append(float(out.detach().abs().sum()))
    elif what == "copy" and t == 2:
        module.note(copy.deepcopy(out.detach()))
    return out, state


def collect(how, outputs):
    """Make one tensor of the steps' outputs."""
    sizes = {len(o) for o in outputs}
    if len(sizes) > 1 or how == "last":
        return outputs[-1]
    if how == "stack":
        return torch.stack(outputs)
    if how == "stack last":
        return torch.stack(outputs, dim=1)[:, -1] + torch.stack(tuple(outputs), -1).mean(-1)
    if how == "cat":
        return torch.cat([o[:, None] for o in outputs], 1)
    if how == "assign":
        kept = outputs[0].new_zeros(len(outputs), *outputs[0].shape)
        for t, o in enumerate(outputs):
            kept[t] = o
        return kept
    if how == "stack in place":
        y = torch.stack(outputs)
        y.mul_(0.5)
        return y + outputs[2]
    if how == "stack times":
        y = torch.stack(outputs)
        with torch.no_grad():
            y *= (torch.arange(len(y)) < 4).to(y.dtype)[:, None, None]
        return y.detach().sum() * 0.1 + outputs[1] + outputs[-1]
    if how == "sum":
        return sum(outputs)
    if how == "some":
        return outputs[1] + outputs[min(3, len(outputs) - 1)]
    if how == "view":
        return torch.stack([o.view(-1)[:4] for o in outputs])
    return torch.vstack(tuple(outputs)) if how == "tuple" else torch.stack(outputs)


def after(module, what, loss, x, index):
    """Unroll the first cell once more and do something with its states; return the loss."""
    if what == "nothing":
        return loss
    hidden, state = module.unroll(0, x, (x[t] for t in range(len(x))), "nothing", index)
    last = hidden[-1]
    loss = loss + 0.1 * module.head(last).square().mean()
    if what == "late hook":
        for h in hidden:
            h.register_hook(lambda g: module.note(g.abs()))
    elif what == "gradient of state":
        (g,) = torch.autograd.grad(loss, hidden[2], retain_graph=True, allow_unused=True)
        module.noted.append(0.0 if g is None else float(g.abs().sum()))
    elif what == "penalty":
        (g,) = torch.autograd.grad(last.sum(), hidden[1], create_graph=True)
        loss = loss + g.square().mean()
    elif what == "parameter":
        module.note(nn.Parameter(last).square())
    elif what == "script":
        loss = loss + gated(last).mean()
    elif what == "bound function":
        loss = loss + (module.head(ste(last)) - 1).square().mean()
    elif what == "data assign":
        buffer = torch.zeros_like(last)
        buffer.data = last.data
        module.note(buffer)
    elif what == "vmap":
        loss = loss + torch.func.vmap(lambda h: h.square().sum())(last).mean()
    elif what == "numpy":
        module.noted.append(float(last.detach().numpy().sum()))
        module.noted.append(float(hidden[2].detach().numpy().sum()))
    elif what == "node hook" and hidden[2].grad_fn is not None:
        hidden[2].grad_fn.register_prehook(lambda gs: module.noted.append(1.0))
    elif what == "multi hook":
        torch.autograd.graph.register_multi_grad_hook(
            hidden, lambda gs: module.noted.extend(float(g.abs().sum()) for g in gs if g is not None)
        )
    elif what == "double backward":
        own = [p for p in module.cells[0].parameters() if p.requires_grad]
        found = torch.autograd.grad(last.square().sum(), own, create_graph=True, allow_unused=True)
        loss = loss + 0.01 * sum(g.square().sum() for g in found if g is not None)
    elif what == "retain graph":
        own = [p for p in module.cells[0].parameters() if p.requires_grad]
        for _ in range(2):
            found = torch.autograd.grad(last.sum(), own, retain_graph=True, allow_unused=True)
            module.noted.append(sum(float(g.abs().sum()) for g in found if g is not None))
    elif what == "input gradient":
        z = x.detach().clone().requires_grad_()
        slices = list(z.unbind(0))
        h = module.unroll(0, z, slices, "nothing", index)[0][-1]
        found = torch.autograd.grad(h.square().sum(), [z, slices[1]], create_graph=True, allow_unused=True)
        loss = loss + 0.1 * sum(g.square().sum() for g in found if g is not None)
    elif what == "storage":
        module.noted.append(float(len({h.untyped_storage().data_ptr() for h in hidden}) == len(hidden)))
        module.noted.append(float(all(type(h) is torch.Tensor for h in hidden)))
    elif what == "jacobian":
        loss = loss + 0.1 * torch.func.grad(lambda h: module.head(h).square().sum())(last).square().mean()
    if what not in ("late hook", "multi hook"):
        loss = loss + 0.01 * sum(t.square().mean() for t in tensors_of(state))
    return loss
