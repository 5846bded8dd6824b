"""Random small LightningModules with their data, Trainer options and callbacks: each a pure function of its seed."""

import copy
import random

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, StochasticWeightAveraging
from random_layers import WIDTH, random_block
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SAMPLES, BATCH, EPOCHS = 3, 20, 4, 3

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 5e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 5e-3),
    "fused": lambda p: torch.optim.AdamW(p, 5e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 2e-3, centered=True),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, 5e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 5e-3),
    "radam": lambda p: torch.optim.RAdam(p, 5e-3),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 0.02),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "lookahead": lambda p: Lookahead(p),
    "wrapper": lambda p: Wrapper(p),
}
ODD = ("lbfgs", "lookahead", "wrapper")
AWAY = (*(None,) * 12, "target", "clip", "norm", "shadow", "shadow list", "hidden copy", "buffer", "freeze later")
LOOPS = ("automatic", "automatic", "automatic", "manual", "raw", "two")


class Lookahead(torch.optim.SGD):
    """Pulls the parameters to slow ones, which it keeps by position."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.05)
        self.slow, self.calls = [p.detach().clone() for p in self.param_groups[0]["params"]], 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.calls += 1
        if self.calls % 3 == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)
        return loss


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer."""

    def __init__(self, parameters):
        self.inner = torch.optim.Adam(parameters, 5e-3)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


class RandomModule(LightningModule):
    """Blocks in a row, a loss with or without extras, an optimizer, and habits between steps."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(random_block(draw) for _ in range(draw.randint(1, 4)))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Linear(WIDTH, WIDTH) if draw.random() < 0.1 else None
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.loop, self.away = draw.choice(LOOPS), draw.choice(AWAY)
        self.optimizer = draw.choice([name for name in OPTIMIZERS if name not in ODD or draw.random() < 0.4])
        self.extra = draw.choice((None, None, None, "penalty", "noise", "double backward"))
        self.scheduled, self.groups = draw.random() < 0.3, draw.random() < 0.3
        if self.optimizer == "lbfgs" or (self.loop != "automatic" and self.optimizer in ("lookahead", "wrapper")):
            self.loop = "automatic"
        if self.loop == "two" or self.optimizer == "lookahead":
            self.groups = False
        if self.extra == "double backward" and any(isinstance(m, nn.RNNBase) for m in self.modules()):
            self.extra = None  # torch has none for these
        self.automatic_optimization = self.loop == "automatic"
        if self.away == "target":
            self.target = copy.deepcopy(self.blocks[0]) if _can_be_copied(self.blocks[0]) else None
            if self.target is not None:
                self.target.requires_grad_(draw.random() < 0.5)
        elif self.away == "shadow":
            self.shadow = {name: p.detach().clone() for name, p in self.named_parameters()}
        elif self.away == "shadow list":
            self.shadow = [p.detach().clone() for p in self.parameters()]
        elif self.away == "hidden copy" and _can_be_copied(self):
            self.shadow = [copy.deepcopy(self.head)]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(x))

    def loss(self, batch):
        x, y = batch
        self.calls += 1
        if self.extra == "noise":
            x = x + 0.01 * torch.randn_like(x)
        if self.extra == "double backward":
            x = x.clone().requires_grad_()
        out = self(x)
        loss = F.cross_entropy(out, y)
        if self.away == "target" and self.target is not None:
            with torch.no_grad():
                goal = self.target(x)
            loss = loss + 0.1 * F.mse_loss(self.blocks[0](x), goal)
        if self.extra == "penalty":
            loss = loss + 1e-3 * self.head.weight.square().sum()
        if self.extra == "double backward":
            (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss = loss + 0.01 * grad.square().sum()
        return loss

    def training_step(self, batch, _):
        if self.loop == "automatic":
            return self.loss(batch)
        optimizers = self.optimizers(use_pl_optimizer=self.loop != "raw")
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        if self.away == "target" and self.target is not None:
            for p, average in zip(self.blocks[0].parameters(), self.target.parameters(), strict=True):
                average.mul_(0.9).add_(p, alpha=0.1)
        elif self.away == "clip":
            for p in self.parameters():
                p.clamp_(-0.3, 0.3)
        elif self.away == "norm":
            self.head.weight.data.div_(self.head.weight.data.norm(dim=1, keepdim=True))
        elif self.away == "shadow":
            for name, p in self.named_parameters():
                self.shadow[name].mul_(0.9).add_(p, alpha=0.1)
        elif self.away == "shadow list":
            for average, p in zip(self.shadow, self.parameters(), strict=True):
                average.mul_(0.9).add_(p, alpha=0.1)
        elif self.away == "hidden copy" and hasattr(self, "shadow"):
            for average, p in zip(self.shadow[0].parameters(), self.head.parameters(), strict=True):
                average.mul_(0.9).add_(p, alpha=0.1)
        elif self.away == "buffer":
            self.calls += 1

    def on_train_epoch_start(self):
        if self.away == "freeze later" and self.current_epoch == 2:
            self.blocks[0].requires_grad_(False)

    def configure_optimizers(self):
        make = OPTIMIZERS[self.optimizer]
        if self.loop == "two":
            halves = [list(self.blocks.parameters()), list(self.head.parameters())]
            if any(p.requires_grad for p in halves[0]):
                return [make(halves[0]), make(halves[1])], []
        parameters = list(self.parameters())
        if self.groups and self.optimizer != "lbfgs":
            parameters = [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 1e-3}]
        optimizer = make(parameters)
        if self.scheduled and self.loop == "automatic":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]
        return optimizer


def _can_be_copied(module):
    try:
        copy.deepcopy(module)
    except Exception:
        return False
    return True


def fit(seed, callbacks=(), *, trace=(), **settings):
    """Build and fit the module of a seed.

    Args:
        seed: Says module, data, Trainer options and Lightning's own callbacks beside ``callbacks``.
        callbacks: Of ours.
        trace: Further callbacks, last in the list.
        **settings: Of the Trainer, such as its strategy.

    Returns:
        Module and Trainer.
    """
    draw = random.Random(f"trainer {seed}")
    module = RandomModule(seed)
    automatic = module.loop == "automatic" and module.optimizer != "lbfgs"
    options = {}
    if automatic and draw.random() < 0.3:
        options["gradient_clip_val"] = 0.5
    if automatic and draw.random() < 0.2:
        options["accumulate_grad_batches"] = 2
    if draw.random() < 0.1 and module.extra != "double backward":
        options["precision"] = "bf16-mixed"
    beside = draw.choice((None,) * 6 + ("average", "swa", "schedule"))
    theirs = {
        None: lambda: [],
        "average": lambda: [EMAWeightAveraging(decay=0.9)] if _can_be_copied(module) else [],
        "swa": lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=1)] if _can_be_copied(module) else [],
        "schedule": lambda: [GradientAccumulationScheduler({1: 2})],
    }[beside if automatic and "accumulate_grad_batches" not in options else None]()
    if theirs and module.away is not None:
        theirs = []
    x = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(seed))
    data = DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), BATCH)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ours = list(callbacks)
    both = [*ours, *theirs] if draw.random() < 0.5 else [*theirs, *ours]
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[*both, *trace], **quiet, **options, **settings)
    torch.manual_seed(seed + 1)
    trainer.fit(module, data)
    return module, trainer


class Moved(Callback):
    """Keeps every parameter as it was when it was first seen, and notes which have moved since, and their gradients.

    Attributes:
        gradients: A batch of the fit to name and largest entry of the gradient, None where there is none, of each
            parameter that might train in it from its start to its end.
    """

    def __init__(self):
        self.first = []  # no dict by names: that is what averages keep, which low rank leaves alone
        self.gradients = []
        self._ever, self._names = set(), set()

    def on_train_batch_start(self, trainer, pl_module, *_):
        seen = {(name, value.shape) for name, value in self.first}
        new = ((n, p.detach().clone()) for n, p in pl_module.named_parameters() if (n, p.shape) not in seen)
        self.first.extend(new)
        self._names = {n for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._ever |= self._moved(pl_module)
        trainable = ((n, p) for n, p in pl_module.named_parameters() if p.requires_grad and n in self._names)
        self.gradients.append({n: None if p.grad is None else float(p.grad.abs().max()) for n, p in trainable})

    def names(self, module, *, by=0.0):
        """Names of the parameters of ``module`` that have moved, by more than a share ``by`` of their largest entry.

        What has moved in some step and is back where it was (an average that was taken in the end) has moved.
        """
        return self._moved(module, by) | (set() if by else self._ever)

    def _moved(self, module, by=0.0):
        first = {(name, value.shape): value for name, value in self.first}
        known = {name: p.detach() for name, p in module.named_parameters() if (name, p.shape) in first}
        moved = {name: float((p - first[name, p.shape]).abs().max()) for name, p in known.items()}
        return {name for name, p in known.items() if not moved[name] <= by * float(p.abs().max())}
