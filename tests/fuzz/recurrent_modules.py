"""Random LightningModules with hand-written loops over random cells."""

import functools
import random
from concurrent.futures import ThreadPoolExecutor

import torch
from lightning.pytorch import LightningModule
from recurrent_cells import FEATURES, FORMS, HIDDEN, QUIRKS, call, make_cell, make_result, map_state
from recurrent_idioms import after, between, collect
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        "schedule": rng.choice(("intra_stream", "native", "native")) if "own" not in kinds else "intra_stream",
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
        parts = zip(spec["kinds"], spec["quirks"], spec["forms"], strict=True)
        self.cells = nn.ModuleList([make_cell(*part) for part in parts])
        self.embed, self.back = nn.Linear(FEATURES, FEATURES), nn.Linear(HIDDEN, FEATURES)
        self.head = nn.Linear(HIDDEN, 2)
        self.start = nn.Parameter(torch.zeros(HIDDEN))
        self.table = nn.Parameter(torch.randn(20, FEATURES))
        self.double() if spec["precision"] == "64-true" else self.float()
        self.losses, self.noted, self.gradients = [], [], []

    def step_of(self, k):
        """Return cell ``k`` as a function ``(x, state) -> (output, state)``."""
        return functools.partial(call, self.cells[k], self.spec["kinds"][k], self.spec["forms"][k])

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

    def unroll(self, k, x, inputs, what, index):
        """Run cell ``k`` over the inputs."""
        step, state, outputs = self.step_of(k), self.first_state(k, x), []
        act = self.now(index)
        total = len(x)
        rng = random.Random(self.spec["seed"] + index)
        for t, s in enumerate(inputs):
            if act and outputs and what == "teacher" and rng.random() < 0.5:
                s = self.back(outputs[-1])
            if act and outputs and what == "sample":
                s = self.table[torch.multinomial(torch.softmax(self.back(outputs[-1]), -1), 1)[:, 0]]
            if act and what == "shrink" and t == total // 2 and state is not None:
                s, state = s[:1], map_state(lambda v: v[:1], state)
            elif act and what == "shrink" and t > total // 2:
                s = s[:1]
            if act and what == "no grad" and t < 2:
                with torch.no_grad():
                    out, state = step(s, state)
            else:
                out, state = step(s, state)
            if act:
                out, state = between(self, what, t, s, out=out, state=state)
            outputs.append(out)
            if act and what == "early exit" and t >= 3 + rng.randrange(3):
                break
        return outputs, state

    def layers(self, x, index):
        layers, source, what = self.spec["layers"], self.spec["source"], self.spec["between"]
        if layers == "stacked":
            first, second = self.step_of(0), self.step_of(1)
            a, b, outputs = self.first_state(0, x), self.first_state(1, x), []
            for t, s in enumerate(self.inputs(x, source)):
                h, a = first(s, a)
                o, b = second(h if self.spec["seed"] % 3 else self.back(h), b)
                if self.now(index):
                    o, b = between(self, "nothing" if what == "shrink" else what, t, s, out=o, state=b)
                outputs.append(o)
            return outputs
        outputs, state = self.unroll(0, x, self.inputs(x, source), what, index)
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
        y = collect(self.spec["collect"], self.layers(x, index))
        return self.head(y)

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
            inner = self.body(x, index).square().sum()
            found = torch.autograd.grad(inner, list(own.values()), create_graph=True, allow_unused=True)
            moved = {
                f"module.{n}": p if g is None else p - 0.1 * g for (n, p), g in zip(own.items(), found, strict=True)
            }
            return torch.func.functional_call(_Body(self, index), moved, (x,))
        if around == "twice":
            return self.body(x, index).mean() + self.body(x * 0.5, index)
        if around == "forward hook":
            handle = self.cells[0].register_forward_hook(lambda m, a, r: self.noted.append(1.0))
            try:
                return self.body(x, index)
            finally:
                handle.remove()
        if around == "thread":
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
        logits = self(x, index)
        loss = logits.float().square().mean() if logits.dtype == torch.bfloat16 else logits.square().mean()
        if self.now(index):
            loss = after(self, self.spec["after"], loss, x, index)
        self.losses.append(float(loss.detach()))
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
