"""Random modules with hand-written loops over random cells, trained with and without IntraStreamScheduling.

Losses, all gradients, what the modules note, and the weights at the end must agree within rounding, over several batches
of changing sizes. One command: ``python tests/fuzz/recurrent_modules.py --modules 5000``.
"""

import argparse
import copy
import random
import sys
import time
import traceback
import warnings
from collections import Counter

import torch
from lightning.pytorch import LightningModule, Trainer
from recurrent_cells import FEATURES, FORMS, HIDDEN, QUIRKS, make_cell, make_result, map_state, read, tensors_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_accel.callbacks import IntraStreamScheduling

SHAPES = ((3, 6), (3, 9), (2, 7), (4, 8), (3, 9))  # streams and steps of each batch
SOURCES = ("index", "index", "iterate", "unbind", "batch first", "embedded", "transposed", "backwards", "one by one")
SOURCES += ("leaf", "narrow", "numpy", "same")
BETWEEN = ("nothing",) * 10 + (
    "mask where",
    "mask times",
    "in place",
    "detach",
    "teacher",
    "sample",
    "early exit",
    "hook",
    "retain",
    "data write",
    "numpy write",
    "clone",
    "no grad",
    "weight write",
    "shrink",
    "watch value",
    "copy",
)
COLLECT = (
    "stack",
    "stack last",
    "last",
    "cat",
    "assign",
    "stack in place",
    "stack times",
    "sum",
    "some",
    "view",
    "tuple",
)
AFTER = ("nothing",) * 6 + (
    "late hook",
    "gradient of state",
    "penalty",
    "parameter",
    "script",
    "bound function",
    "data assign",
    "vmap",
    "numpy",
    "node hook",
    "multi hook",
    "double backward",
    "retain graph",
    "input gradient",
    "storage",
    "jacobian",
)
AROUND = ("nothing",) * 8 + (
    "checkpoint",
    "functional",
    "offload",
    "inner step",
    "autocast",
    "twice",
    "forward hook",
    "thread",
)
LAYERS = ("one",) * 4 + ("stacked", "layer by layer", "both ways", "same cell both ways", "encoder and decoder")


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


def draw(seed):
    """Draw what a module is made of."""
    rng = random.Random(seed)
    kinds = [rng.choice(("lstm", "lstm", "gru", "rnn", "own", "own", "own")) for _ in range(2)]
    spec = {
        "seed": seed,
        "kinds": kinds,
        "quirks": [rng.choice(QUIRKS) for _ in range(2)],
        "forms": [rng.choice(FORMS) for _ in range(2)],
        "source": rng.choice(SOURCES),
        "between": rng.choice(BETWEEN),
        "collect": rng.choice(COLLECT),
        "after": rng.choice(AFTER),
        "around": rng.choice(AROUND),
        "layers": rng.choice(LAYERS),
        "when": rng.choice(("always", "always", "later", "odd")),
        "own start": rng.random() < 0.5,
        "optimizer": rng.choice(("sgd", "adam")),
        "schedule": rng.choice(("intra_stream", "native")) if "own" not in kinds else "intra_stream",
        "accumulate": rng.choice((1, 1, 1, 2)),
        "precision": rng.choice(("64-true",) * 5 + ("32-true",)),
    }
    if spec["between"] in ("data write", "numpy write"):  # plain gradients are wrong then, which only a comparison sees
        spec["when"] = "always"
    if spec["after"] in ("penalty", "double backward", "jacobian", "gradient of state", "input gradient"):
        spec["around"] = "nothing" if spec["around"] in ("checkpoint", "offload", "autocast") else spec["around"]
    return spec


class FuzzModule(LightningModule):
    """A module made of a drawn specification."""

    def __init__(self, spec):
        super().__init__()
        torch.manual_seed(spec["seed"] % 1000)
        self.spec = spec
        made = [make_cell(*parts) for parts in zip(spec["kinds"], spec["quirks"], spec["forms"], strict=True)]
        self.cells = nn.ModuleList([cell for cell, _ in made])
        self.embed, self.back = nn.Linear(FEATURES, FEATURES), nn.Linear(HIDDEN, FEATURES)
        self.head = nn.Linear(HIDDEN, 2)
        self.start = nn.Parameter(torch.zeros(HIDDEN))
        self.table = nn.Parameter(torch.randn(20, FEATURES))
        self.double() if spec["precision"] == "64-true" else self.float()
        self.losses, self.noted, self.gradients = [], [], []

    def step_of(self, k):
        """Return cell ``k`` as a function; made anew, so that copies of the module use their own cells."""
        cell, form = self.cells[k], self.spec["forms"][k]
        kind = self.spec["kinds"][k]
        if kind == "lstm":
            return lambda x, state: (lambda s: (s[0], s))(cell(x, state))
        if kind == "gru":
            return lambda x, state: (lambda h: (h, h))(cell(x, state))
        if kind == "rnn":
            return lambda x, state: (lambda h: (h, h))(cell(input=x, hx=state))
        return lambda x, state: read(cell(x, state), form)

    def note(self, value):
        self.noted.append(float(value.detach().double().sum()))

    def now(self, index):
        return {"always": True, "later": index >= 3, "odd": index % 2 == 1}[self.spec["when"]]

    def inputs(self, x, source):
        """Return the steps' inputs; ``x`` is of shape (T, B, F)."""
        if source == "iterate":
            return iter(x)
        if source == "unbind":
            return list(x.unbind(0))
        if source == "batch first":
            y = x.transpose(0, 1).contiguous()
            return [y[:, t] for t in range(y.shape[1])]
        if source == "embedded":
            y = self.embed(x)
            return (y[t] for t in range(len(y)))
        if source == "transposed":
            y = self.embed(x.transpose(0, 1)).transpose(0, 1)
            if self.hook_inputs:
                y.register_hook(lambda g: -g)
            return iter(y)
        if source == "backwards":
            return (x[t] for t in reversed(range(len(x))))
        if source == "one by one":
            return (self.embed(s) for s in x)
        if source == "leaf":
            self.leaf = x.detach().clone().requires_grad_()
            return (self.leaf[t] for t in range(len(x)))
        if source == "narrow":
            return (x[:-1][t] for t in range(len(x) - 1))
        if source == "numpy":
            return self.refilled(x)
        if source == "same":
            c = self.embed(x[0])
            return (c for _ in range(len(x)))
        return (x[t] for t in range(len(x)))

    def refilled(self, x):
        buffer = torch.zeros_like(x[0]).numpy()
        step = torch.from_numpy(buffer)
        for s in x:
            buffer[:] = s.numpy()
            yield step

    def first_state(self, k, x):
        streams = x.shape[1]
        kind, form = self.spec["kinds"][k], self.spec["forms"][k]
        if not self.spec["own start"]:
            return None
        h = self.start.expand(streams, HIDDEN) + 0.0
        c = x.new_zeros(streams, HIDDEN)
        if kind == "lstm":
            return (h, c)
        if kind in ("gru", "rnn"):
            return h
        made = make_result(h, c, form)
        return made[1] if form == "output and state" else made[0] if form == "with none" else made

    def unroll(self, k, x, inputs, between, index):
        """Run cell ``k`` over the inputs."""
        step, state, outputs = self.step_of(k), self.first_state(k, x), []
        act = self.now(index)
        total = len(x)
        rng = random.Random(self.spec["seed"] + index)
        for t, s in enumerate(inputs):
            if act and outputs and between == "teacher" and rng.random() < 0.5:
                s = self.back(outputs[-1])
            if act and outputs and between == "sample":
                s = self.table[torch.multinomial(torch.softmax(self.back(outputs[-1]), -1), 1)[:, 0]]
            if act and between == "shrink" and t == total // 2 and state is not None:
                s, state = s[:1], map_state(lambda v: v[:1], state)
            elif act and between == "shrink" and t > total // 2:
                s = s[:1]
            if act and between == "no grad" and t < 2:
                with torch.no_grad():
                    out, state = step(s, state)
            else:
                out, state = step(s, state)
            if act:
                out, state = self.between(between, t, out, state, s)
            outputs.append(out)
            if act and between == "early exit" and t >= 3 + rng.randrange(3):
                break
        return outputs, state

    def between(self, between, t, out, state, s):
        if between == "mask where":
            keep = (s[:, :1] > -0.5).detach()
            state = map_state(lambda v: torch.where(keep, v, torch.zeros_like(v)), state)
        elif between == "mask times":
            state = map_state(lambda v: v * (s[:, :1] > -0.5).to(v.dtype), state)
        elif between == "in place" and t == 3:
            tensors_of(state)[0].mul_(0.5)
        elif between == "detach" and t % 4 == 3:
            state = map_state(torch.Tensor.detach, state)
        elif between == "hook" and t == 2 and out.requires_grad:
            out.register_hook(lambda g: g * 2)
        elif between == "retain" and t == 2 and out.requires_grad:
            out.retain_grad()
            self.retained = out
        elif between == "data write" and t == 2:
            tensors_of(state)[0].data.mul_(0.5)
        elif between == "numpy write" and t == 2:
            tensors_of(state)[0].detach().numpy()[:] *= 0.5
        elif between == "clone" and t == 4:
            state = map_state(torch.clone, state)
        elif between == "weight write" and t == 3:
            with torch.no_grad():
                next(iter(self.cells[0].parameters())).data *= 1.0
        elif between == "watch value":
            self.noted.append(float(out.detach().abs().sum()))
        elif between == "copy" and t == 2:
            self.note(copy.deepcopy(out.detach()))
        return out, state

    def collect(self, outputs):
        how = self.spec["collect"]
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

    def layers(self, x, index):
        layers, source, between = self.spec["layers"], self.spec["source"], self.spec["between"]
        if layers == "stacked":
            first, second = self.step_of(0), self.step_of(1)
            a, b, outputs = self.first_state(0, x), self.first_state(1, x), []
            for t, s in enumerate(self.inputs(x, source)):
                h, a = first(s, a)
                o, b = second(self.back(h) if FEATURES != HIDDEN else h, b)
                if self.now(index):
                    o, b = self.between("nothing" if between == "shrink" else between, t, o, b, s)
                outputs.append(o)
            return outputs
        outputs, state = self.unroll(0, x, self.inputs(x, source), between, index)
        if layers == "layer by layer" and len({len(o) for o in outputs}) == 1:
            y = self.back(torch.stack(outputs))
            outputs, _ = self.unroll(1, y, iter(y), "nothing", index)
        elif layers in ("both ways", "same cell both ways"):
            k = 0 if layers.startswith("same") else 1
            others, _ = self.unroll(k, x, (x[t] for t in reversed(range(len(x)))), "nothing", index)
            outputs = [o + others[0][: len(o)] for o in outputs]
        elif layers == "encoder and decoder" and self.spec["kinds"][0] == self.spec["kinds"][1] == "lstm":
            step = self.step_of(1)
            for s in x[:-1]:
                if len(s) != len(state[0]):
                    break
                out, state = step(s, state)
                outputs.append(out)
        return outputs

    def body(self, x, index):
        y = self.collect(self.layers(x, index))
        return self.head(y), y

    def forward(self, x, index):
        around = self.spec["around"] if self.now(index) else "nothing"
        if around == "checkpoint":
            return checkpoint(lambda x: self.body(x, index), x, use_reentrant=False)
        if around == "offload":
            with torch.autograd.graph.save_on_cpu():
                return self.body(x, index)
        if around == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x, index)
        if around == "functional":
            named = {name: p * 0.9 for name, p in self.named_parameters() if name.startswith("cells.0")}
            return torch.func.functional_call(_Body(self, index), {f"module.{n}": p for n, p in named.items()}, (x,))
        if around == "inner step":
            own = {name: p for name, p in self.named_parameters() if name.startswith("cells.0") and p.requires_grad}
            inner = self.body(x, index)[0].square().sum()
            found = torch.autograd.grad(inner, list(own.values()), create_graph=True, allow_unused=True)
            moved = {
                f"module.{n}": p if g is None else p - 0.1 * g for (n, p), g in zip(own.items(), found, strict=True)
            }
            return torch.func.functional_call(_Body(self, index), moved, (x,))
        if around == "twice":
            first, _ = self.body(x, index)
            second, y = self.body(x * 0.5, index)
            return first.mean() + second, y
        if around == "forward hook":
            handle = self.cells[0].register_forward_hook(lambda m, a, r: self.noted.append(1.0))
            try:
                return self.body(x, index)
            finally:
                handle.remove()
        if around == "thread":
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.body, x, index).result()
        return self.body(x, index)

    @property
    def hook_inputs(self):
        return self.spec["seed"] % 2 == 0

    def training_step(self, batch, index):
        self.outputs = []
        for cell in self.cells:
            if hasattr(cell, "factor"):
                cell.factor = 1.0 - 0.1 * (index if self.spec["when"] != "always" else 0)
                cell.settings["gain"] = cell.factor
                if cell.quirk == "norm" and self.spec["when"] == "odd":
                    cell.act = torch.tanh if index % 2 else torch.sigmoid
        x = batch.transpose(0, 1).to(next(self.parameters()).dtype)
        logits, y = self(x, index)
        loss = logits.float().square().mean() if logits.dtype == torch.bfloat16 else logits.square().mean()
        if self.now(index):
            loss = self.after(self.spec["after"], loss, y, x, index)
        self.losses.append(float(loss.detach()))
        return loss

    def after(self, after, loss, y, x, index):
        if after == "nothing":
            return loss
        hidden, state = self.unroll(0, x, (x[t] for t in range(len(x))), "nothing", index)
        last = hidden[-1]
        loss = loss + 0.1 * self.head(last).square().mean()
        if after == "late hook":
            for h in hidden:
                h.register_hook(lambda g: self.note(g.abs()))
        elif after == "gradient of state":
            (g,) = torch.autograd.grad(loss, hidden[2], retain_graph=True, allow_unused=True)
            self.noted.append(0.0 if g is None else float(g.abs().sum()))
        elif after == "penalty":
            (g,) = torch.autograd.grad(last.sum(), hidden[1], create_graph=True)
            loss = loss + g.square().mean()
        elif after == "parameter":
            self.note(nn.Parameter(last).square())
        elif after == "script":
            loss = loss + gated(last).mean()
        elif after == "bound function":
            loss = loss + (self.head(ste(last)) - 1).square().mean()
        elif after == "data assign":
            buffer = torch.zeros_like(last)
            buffer.data = last.data
            self.note(buffer)
        elif after == "vmap":
            loss = loss + torch.func.vmap(lambda h: h.square().sum())(last).mean()
        elif after == "numpy":
            self.noted.append(float(last.detach().numpy().sum()))
            self.noted.append(float(hidden[2].detach().numpy().sum()))
        elif after == "node hook" and hidden[2].grad_fn is not None:
            hidden[2].grad_fn.register_prehook(lambda gs: self.noted.append(1.0))
        elif after == "multi hook":
            torch.autograd.graph.register_multi_grad_hook(
                hidden, lambda gs: self.noted.extend(float(g.abs().sum()) for g in gs if g is not None)
            )
        elif after == "double backward":
            own = [p for p in self.cells[0].parameters() if p.requires_grad]
            found = torch.autograd.grad(last.square().sum(), own, create_graph=True, allow_unused=True)
            loss = loss + 0.01 * sum(g.square().sum() for g in found if g is not None)
        elif after == "retain graph":
            own = [p for p in self.cells[0].parameters() if p.requires_grad]
            for _ in range(2):
                found = torch.autograd.grad(last.sum(), own, retain_graph=True, allow_unused=True)
                self.noted.append(sum(float(g.abs().sum()) for g in found if g is not None))
        elif after == "input gradient":
            z = x.detach().clone().requires_grad_()
            slices = list(z.unbind(0))
            h = self.unroll(0, z, slices, "nothing", index)[0][-1]
            found = torch.autograd.grad(h.square().sum(), [z, slices[1]], create_graph=True, allow_unused=True)
            loss = loss + 0.1 * sum(g.square().sum() for g in found if g is not None)
        elif after == "storage":
            self.noted.append(float(len({h.untyped_storage().data_ptr() for h in hidden}) == len(hidden)))
            self.noted.append(float(all(type(h) is torch.Tensor for h in hidden)))
        elif after == "jacobian":
            loss = loss + 0.1 * torch.func.grad(lambda h: self.head(h).square().sum())(last).square().mean()
        if after not in ("late hook", "multi hook"):
            loss = loss + 0.01 * sum(t.square().mean() for t in tensors_of(state))
        return loss

    def on_after_backward(self):
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()})
        if getattr(self, "retained", None) is not None:
            self.noted.append(0.0 if self.retained.grad is None else float(self.retained.grad.abs().sum()))
            self.retained = None

    def configure_optimizers(self):
        kind = torch.optim.SGD if self.spec["optimizer"] == "sgd" else torch.optim.Adam
        return kind(self.parameters(), lr=0.01)


class _Body(nn.Module):
    def __init__(self, module, index):
        super().__init__()
        self.module, self.index = module, index

    def forward(self, x):
        return self.module.body(x, self.index)


def fit(spec, callbacks):
    """Train a module; return it, or what the training raised."""
    module = FuzzModule(spec)
    generator = torch.Generator().manual_seed(spec["seed"] % 997)
    batches = [torch.randn(b, t, FEATURES, generator=generator, dtype=torch.double) for b, t in SHAPES]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    torch.manual_seed(spec["seed"])
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        accumulate_grad_batches=spec["accumulate"],
        **quiet,
    )
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    except Exception as error:
        return module, error
    return module, None


def compare(spec):
    """Return whether some loop ran scheduled, and what differs, empty if nothing does."""
    plain, failure = fit(spec, [])
    callback = IntraStreamScheduling(spec["schedule"])
    other, error = fit(spec, [callback])
    gained = any("chains of" in line for line in callback.report)
    if failure is not None:
        same = error is not None and type(error) is type(failure)
        return gained, "" if same else f"the plain fit raises {failure!r}, the other one {error!r}"
    if error is not None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return gained, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    close = 1e-7 if spec["precision"] == "64-true" and spec["around"] != "autocast" else 2e-3
    for name in ("losses", "noted"):
        a, b = getattr(plain, name), getattr(other, name)
        if len(a) != len(b):
            return gained, f"{len(b)} {name}, plain {len(a)}"
        for k, (p, q) in enumerate(zip(a, b, strict=True)):
            if not (abs(p - q) <= close * (1 + abs(p)) or p == q or (p != p and q != q)):
                return gained, f"{name}[{k}]: {q}, plain {p}"
    for k, (a, b) in enumerate(zip(plain.gradients, other.gradients, strict=True)):
        for name, p in a.items():
            q = b[name]
            if (p is None) != (q is None):
                return gained, f"gradient of {name} in batch {k}: {'None' if q is None else 'there'}, plain not so"
            if p is not None and not torch.allclose(p, q, rtol=close, atol=close, equal_nan=True):
                return gained, f"gradient of {name} in batch {k} is off by {float((p - q).abs().max()):.1e}"
    for (name, p), q in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        if not torch.allclose(p.double(), q.double(), rtol=close, atol=10 * close, equal_nan=True):
            return gained, f"{name} at the end is off by {float((p - q).abs().max()):.1e}"
    left = [name for name, m in other.named_modules() if "forward" in m.__dict__]
    return gained, f"`forward` is left on {left}" if left else ""


def run(seeds, verbose=False):
    """Compare the modules of many seeds; return how many gained and the differences by seed."""
    gained, wrong, reasons = 0, {}, Counter()
    for seed in seeds:
        spec = draw(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            better, problem = compare(spec)
        gained += better
        if problem:
            wrong[seed] = problem
            if verbose:
                print(f"seed {seed}: {problem}\n    {spec}", flush=True)
    return gained, wrong, reasons


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the first module")
    arguments = parser.parse_args()
    import logging

    for name in ("lightning.pytorch", "lightning_accel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    begun, gained, wrong = time.monotonic(), 0, {}
    for start in range(0, arguments.modules, 250):
        seeds = range(arguments.seed + start, arguments.seed + min(start + 250, arguments.modules))
        more, found, _ = run(seeds, verbose=True)
        gained, wrong = gained + more, {**wrong, **found}
        done = start + len(seeds)
        seconds = time.monotonic() - begun
        print(f"{done} modules, {gained} ran scheduled, {len(wrong)} differ, {seconds:.0f} s", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
