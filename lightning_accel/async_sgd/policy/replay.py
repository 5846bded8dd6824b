"""Run a server's log again in one process: the same steps in the same order give the same bits."""

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.pushes import LogEntry
from lightning_accel.async_sgd.policy.stepping import set_groups, step_optimizer

GradientOf = Callable[[LogEntry, Sequence[Tensor]], Sequence[Tensor | None]]


def replay(
    log: Sequence[LogEntry], parameters: Sequence[Tensor], optimizers: Sequence[Optimizer], gradient_of: GradientOf
) -> None:
    """Make every step of ``log`` again, in place.

    Args:
        log: Of `ParameterServer`, with ``record_log``; pushes of gradients, not of local steps.
        parameters: Where the run began, at the version before the first entry.
        optimizers: Over these parameters, in their state at that version.
        gradient_of: Returns the gradients (one entry a parameter, or None) of an entry at given parameters: those
            published as the entry's ``base_version``, on the batches of its ``leases``. Must not depend on anything
            else.

    Raises:
        ValueError: If the log has a gap, or a gradient belongs to a version from before its beginning.

    Complexity:
        Keeps a copy of the parameters for every version that a later entry still needs.
    """
    uses = Counter(entry.base_version for entry in log)
    version = log[0].version - 1 if log else 0
    history = {version: [p.detach().clone() for p in parameters]} if uses[version] else {}
    offsets: dict[int, Tensor] = {}  # by place: forecast minus parameter
    for entry in log:
        if entry.version != version + 1:
            raise ValueError(f"the log goes from version {version} to {entry.version}; a step is missing.")
        if entry.base_version not in history:
            raise ValueError(f"version {entry.base_version} is from before the log begins, at version {version}.")
        gradients = gradient_of(entry, history[entry.base_version])
        uses[entry.base_version] -= 1
        if not uses[entry.base_version]:
            del history[entry.base_version]
        optimizer = optimizers[entry.optimizer]
        set_groups(optimizer, entry.groups)
        if entry.scale != 1.0:
            gradients = [None if g is None else g * entry.scale for g in gradients]
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before = {i: p.detach().clone() for i, p in enumerate(parameters) if id(p) in owned and entry.reach}
        step_optimizer(optimizer, parameters, gradients, weight=entry.weight)
        offsets.update({i: (parameters[i].detach() - old) * entry.reach for i, old in before.items()})
        version = entry.version
        if uses[version]:
            history[version] = [p.detach().clone() for p in parameters]
            for i, offset in offsets.items():
                history[version][i] += offset
