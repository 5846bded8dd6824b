"""What anyone can do without this package, as arms of a comparison: the strongest cheap alternatives."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lightning_accel.measure import available_cores

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What a user writes, and what tables call it.
PEERS = {
    "fused_optimizer": "fused optimizer",
    "torch_compile": "compiled",
    "all_threads": "all threads",
    "freeze_bottom_half": "half frozen",
    "magnitude_pruning": "magnitude pruning",
}


class FreezeBottomHalf(Callback):
    """Freeze the first modules that hold half of the parameters: the cheapest way to make a step faster."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze once all parameters are in the optimizer; those without a gradient are skipped by it."""
        parameters = list(pl_module.parameters())
        left = sum(p.numel() for p in parameters) // 2
        for parameter in parameters:
            left -= parameter.numel()
            if left < 0:
                break
            parameter.requires_grad_(False)


class FuseOptimizers(Callback):
    """Let torch's optimizers update all parameters in one kernel, where they can; the same as ``fused=True``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Switch before the first step, which makes the state that a fused step needs."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "fused" in group and all(p.is_floating_point() for p in group["params"]):
                    group.update(fused=True, **({"foreach": False} if "foreach" in group else {}))


def compile_module(model: LightningModule) -> None:
    """Compile ``forward`` in place, or the submodules where the module has none of its own.

    ``torch.compile(model)`` would compile ``training_step``, and fails at the first ``self.log`` in it (torch 2.13,
    Lightning 2.6.6).
    """
    whole = type(model).forward is not LightningModule.forward
    for module in [model] if whole else list(model.children()):
        module.compile()


def prune_by_magnitude(model: LightningModule, sparsity: float) -> ModelPruning:
    """Return Lightning's pruning of whole rows by their norm, once, of all layers but the last.

    Args:
        model: Whose layers are pruned.
        sparsity: Share of the rows of each layer that become zero, in (0, 1).
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)][:-1]
    return ModelPruning(
        "ln_structured",
        parameters_to_prune=[(layer, "weight") for layer in layers],
        use_global_unstructured=False,
        amount=sparsity,
        pruning_dim=0,
        pruning_norm=2,
        apply_pruning=_in_the_first_epoch,
        make_pruning_permanent=True,
    )


def _in_the_first_epoch(epoch: int) -> bool:
    return epoch == 0


def join(peer: str | None, trainer: Trainer, model: LightningModule, sparsity: float | None) -> None:
    """Let a peer take part in a fit that has just been built."""
    callbacks: dict[str, Callable[[], Callback]] = {
        "freeze_bottom_half": FreezeBottomHalf,
        "fused_optimizer": FuseOptimizers,
        "magnitude_pruning": lambda: prune_by_magnitude(model, sparsity or 0.5),
    }
    if peer in callbacks:
        trainer.callbacks.append(callbacks[peer]())  # type: ignore[attr-defined]
    if peer == "torch_compile":
        compile_module(model)


def target_sparsity(cfg: "DictConfig") -> float | None:
    """Return the share of groups that a projection of this configuration is to clear; ``None`` without one."""
    for node in (cfg.get("callbacks") or {}).values():
        if node.get("target_sparsity") is not None:
            return float(node.target_sparsity)
    return None


def free_alternatives(cfg: "DictConfig") -> list[str]:
    """Return the peers that make sense beside this configuration."""
    left_out = {"magnitude_pruning"} if target_sparsity(cfg) is None else set()
    threads = cfg.compare.threads
    if threads is None or threads >= available_cores():
        left_out.add("all_threads")
    return [name for name in PEERS if name not in left_out]
