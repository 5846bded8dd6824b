"""The optimizer steps of one worker: what is pushed and pulled, and when."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.module_buffers import ModuleBuffers
from lightning_accel.async_sgd.optimizer_steps import (
    Closure,
    SentGroups,
    changed_since,
    leave_states,
    pass_on_state,
    places_in,
    post_hooks,
    pushing_step,
    refuse_compressed,
    refuse_unsupported,
    take_state,
    with_hooks,
)
from lightning_accel.async_sgd.policy.leases import LeaseId
from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers
from lightning_accel.async_sgd.policy.pushes import ASSIGN, NO_UPDATE, OUTER, OVERWRITE
from lightning_accel.async_sgd.recompute import Recomputation
from lightning_accel.async_sgd.replicas.shards import put, whole
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Membership, Opening, ParameterStore, Snapshot


class Worker:
    """Turn ``optimizer.step()`` of given optimizers into pushes and pulls.

    The optimizers stay the same objects, so schedulers, clipping, scalers and step hooks act as ever; their state lives
    with the server's copies. A step pushes, waits until that is applied, and pulls the new parameters.

    Args:
        store: Where to.
        settings: Of the run.
        parameters: All parameters of the module by name, each once, in an order that every worker shares.
        buffers: All buffers by name.
        optimizers: Over these parameters.
        watch: Whether the server gets to know what anyone but an optimizer makes of the parameters between two steps
            (clamps them, say), if the coordinator does it.
        module: Owner of the parameters and buffers: tells batch norm's statistics, which are averaged, from other
            buffers, and what a forward pass put in their place. Without, all buffers are the coordinator's.

    Raises:
        ValueError: If an optimizer holds a parameter that is not in ``parameters``, or cannot work on a server.
    """

    def __init__(
        self,
        store: ParameterStore,
        settings: Settings,
        parameters: dict[str, nn.Parameter],
        buffers: dict[str, Tensor],
        optimizers: Sequence[Optimizer],
        *,
        watch: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        self.store, self.settings, self.watch = store, settings, watch
        self.optimizers = list(optimizers)
        self.steps = [0] * len(self.optimizers)  # of the server, as of the last pull
        self.own_steps = [0] * len(self.optimizers)  # pushed from here
        self.version = 0
        self._last_push = 0
        self.pending: list[LeaseId] = []  # batches whose gradients are in no push yet
        self._local_steps: list[Callable[[], Any]] = [optimizer.step for optimizer in self.optimizers]
        self._module = module
        self._recomputation: Recomputation | None = None
        refuse_unsupported(self.optimizers, settings.optimizer_device)
        self.follow(parameters, buffers)

    def follow(self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
        """Take these for the module's; gradients not yet pushed are forgotten. To begin, and after layers' exchange.

        Raises:
            ValueError: If an optimizer holds a parameter that is not among ``parameters``.
        """
        self.parameters = parameters
        self._buffers = ModuleBuffers(self._module, buffers)
        self._tensors: list[nn.Parameter] = list(parameters.values())
        places = {id(p): i for i, p in enumerate(self._tensors)}
        self._owned = [places_in(optimizer, places) for optimizer in self.optimizers]
        self._stepped = {i for owned in self._owned for i in owned}
        self._sums: list[dict[int, Tensor]] = [{} for _ in self.optimizers]
        self._counts: defaultdict[int, int] = defaultdict(int)
        self._since_pull = 0
        self.know_groups()
        self._base: list[Tensor] = []
        if self._recomputation is not None:
            self._recomputation.detach()
        recomputes = self.settings.buffers == "recompute"
        self._recomputation = Recomputation(self._module) if self._module and recomputes else None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The module's buffers by name."""
        return self._buffers.now()

    def shared_buffers(self, cut: Snapshot) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers that the server, and not this worker, has the last word on, each with its value."""
        if self.settings.buffers != "mean" or (self.store.is_coordinator and self.store.live_workers == 1):
            return []
        triples = zip(self.buffers.values(), cut.buffers, self._buffers.roles, strict=True)
        return [(b, value) for b, value, role in triples if not self.store.is_coordinator or role != "own"]

    def opening(self, *, version: int = 0, steps: Sequence[int] = (), epochs: Sequence[dict[str, Any]] = ()) -> Opening:
        """Return what opens a run: copies of parameters, buffers and optimizers on CPU."""
        tensors = [nn.Parameter(whole(p.detach()).cpu().clone(), p.requires_grad) for p in self._tensors]
        copies: dict[int, Tensor] = {id(p): copied for p, copied in zip(self._tensors, tensors, strict=True)}
        optimizers = copy_optimizers(self.optimizers, copies)
        for state in (state for optimizer in optimizers for state in optimizer.state.values()):
            state.update({k: whole(v).cpu() if isinstance(v, Tensor) else v for k, v in state.items()})
        return Opening(
            names=list(self.parameters),
            parameters=tensors,
            buffer_names=list(self.buffers),
            buffers=[b.detach().cpu().clone() for b in self.buffers.values()],
            buffer_roles=self._buffers.roles,
            optimizers=optimizers,
            version=version,
            steps=list(steps) or [0] * len(optimizers),
            epochs=list(epochs),
        )

    def join(self, opening: Callable[[], Opening]) -> Membership:
        """Enter the run and read its parameters."""
        membership = self.store.join(opening)
        self.begin()
        return membership

    def begin(self) -> None:
        """Read the run's parameters, and leave the optimizers' state to the server."""
        self.pull(whole=True)
        if not self.settings.local_steps:
            leave_states(self.optimizers)

    def send_changes(self) -> None:
        """Give the server what was made of parameters since they were read, if this worker is to be heard; not ways."""
        if not self.watch or not self._base or not self.store.is_coordinator:
            return
        changed = changed_since(self._tensors, self._base, but=self._stepped if self.settings.local_steps else ())
        if any(value is not None for value in changed):
            refuse_compressed("parameters were changed between two steps", self.settings.compression.name)
            self.store.wait_for(self._send(changed, OVERWRITE))
            self._remember(changed)

    @torch.no_grad()
    def _remember(self, values: Sequence[Tensor | None] = ()) -> None:
        if len(self._base) != len(self._tensors):
            self._base = [torch.empty_like(p) for p in self._tensors]
        for base, value in zip(self._base, values or self._tensors, strict=True):
            if value is not None:
                base.copy_(value)

    def attach(self) -> None:
        """Make ``step`` of every optimizer ours."""
        if self.has_step_hooks:
            refuse_compressed("a step hook of the optimizer may change parameters", self.settings.compression.name)
        for index, optimizer in enumerate(self.optimizers):
            step = pushing_step(functools.partial(self.step, index))
            hooked = step if self.settings.local_steps else with_hooks(step, self.settle)
            hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedulers ask this to warn of no step
            optimizer.step = MethodType(hooked, optimizer)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the optimizers their own ``step`` back."""
        if self._recomputation is not None:
            self._recomputation.detach()
        for optimizer in self.optimizers:
            vars(optimizer).pop("step", None)
            take_state(optimizer)

    def step(self, index: int, closure: Closure | None) -> Any:
        """Make one step of optimizer ``index``: run the closure, push, pull."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.send_changes()
        if self.settings.local_steps:
            self._step_locally(index)
        else:
            self._step_remotely(index)
        return loss

    def pull(self, places: Sequence[int] | None = None, *, whole: bool = False) -> None:
        """Read the latest parameters (of all, or those at ``places``), and buffers where they are shared.

        A step reads what it has stepped: others may be in a graph that is yet to go backward. The coordinator, whose
        buffers the others read, reads but the averages, or all of them with ``whole``.
        """
        shared: list[Tensor | None] = []
        alone = self.store.is_coordinator and self.store.live_workers == 1  # what callbacks make of buffers stays
        if whole or (self.settings.buffers == "mean" and not alone):
            every = whole or not self.store.is_coordinator
            pairs = zip(self.buffers.values(), self._buffers.roles, strict=True)
            shared = [buffer if every or role != "own" else None for buffer, role in pairs]
        chosen = range(len(self._tensors)) if places is None else set(places)
        wanted = [p if i in chosen else None for i, p in enumerate(self._tensors)]
        self.version, self.steps = self.store.pull(wanted, shared)
        self._since_pull = 0
        if self.settings.local_steps or self.has_step_hooks or (self.watch and self.store.is_coordinator):
            self._remember()

    def begin_batch(self) -> None:
        """Read what the steps of the last batch have left unread, where others may have changed it."""
        apart = any(len(owned) < len(self._tensors) for owned in self._owned)
        if apart and self._since_pull == 0 and not self.settings.local_steps and self.store.live_workers > 1:
            self.send_changes()
            self.pull()

    def settle(self, optimizer: Optimizer, attempts: int = 3) -> None:
        """Give the server what step hooks (projections, masks) made of the parameters.

        Counts only if nobody has stepped meanwhile; else the hooks run again on what is new. Alone it always counts.
        """
        hooks = post_hooks(optimizer)
        for attempt in range(attempts if hooks and self._base else 0):
            changed = changed_since(self._tensors, self._base)
            if all(value is None for value in changed) or self.store.wait_for(self._send(changed, ASSIGN)):
                break
            if attempt + 1 < attempts:
                self.pull()
                for hook in hooks:
                    hook(optimizer, (), {})
        if hooks and self._base:
            self._remember()  # what the server did not take is not offered again

    def enforce(self) -> None:
        """Run the step hooks once more, when the others have stopped: their last steps went without."""
        self.pull()
        for optimizer in self.optimizers:
            for hook in post_hooks(optimizer):
                hook(optimizer, (), {})
            self.settle(optimizer)

    @property
    def has_step_hooks(self) -> bool:
        """Whether anything is called after an optimizer's step."""
        return any(post_hooks(optimizer) for optimizer in self.optimizers)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Put the parameters, and shared buffers, of a cut in place; the next step must follow a `pull`.

        With ``buffers="recompute"`` batch-norm statistics are computed for these parameters, and put into the cut.
        """
        for parameter, value in zip(self._tensors, snapshot.parameters, strict=True):
            put(parameter, value)
        if self.watch:
            self._remember()
        for buffer, value in self.shared_buffers(snapshot):
            buffer.copy_(value)
        if self._recomputation is not None and self._recomputation.recompute():
            for buffer, value in zip(self.buffers.values(), snapshot.buffers, strict=True):
                value.copy_(buffer)

    def flush(self) -> None:
        """Push what was accumulated, commit what is pending, and wait until all of it is applied."""
        if self.settings.local_steps and self._counts[OUTER]:
            self._push_way()
        for index in range(len(self.optimizers)):
            if self._counts[index]:
                self._push(index)
        if self.pending:
            self._last_push = self._send([None] * len(self._tensors), NO_UPDATE)
        self.store.wait_for(self._last_push)

    def _step_remotely(self, index: int) -> None:
        if pass_on_state(self.optimizers[index], self.store, index):
            self.pull()
        gradients = {i: self._tensors[i].grad for i in self._owned[index]}
        # a sparse gradient (of a functional embedding) has no place in shared memory
        present = {i: g.to_dense() if g.is_sparse else g for i, g in gradients.items() if g is not None}
        self._counts[index] += 1
        if self.settings.n_push > 1:
            for i, gradient in present.items():
                total = self._sums[index].get(i)
                self._sums[index][i] = gradient.clone() if total is None else total.add_(gradient)
            if self._counts[index] >= self.settings.n_push:
                self._push(index)
        else:
            self._sums[index] = present
            self._push(index)
        self._since_pull += 1
        if self._since_pull >= self.settings.n_fetch:
            self.pull(self._owned[index])

    def _push(self, index: int) -> None:
        sums, count = self._sums[index], self._counts[index]
        self._sums[index], self._counts[index] = {}, 0
        for total in sums.values() if count > 1 else ():
            total.div_(count)
        if not sums:
            # torch skips parameters without a gradient; with none at all there is no step to make
            if self.pending or self.buffers:  # which a forward pass may have changed all the same
                self.store.wait_for(self._send([None] * len(self._tensors), NO_UPDATE))
            return
        self.store.wait_for_slack()
        sequence = self._send([sums.get(i) for i in range(len(self._tensors))], index)
        self.own_steps[index] += 1
        self._last_push = sequence
        if self._since_pull + 1 >= self.settings.n_fetch and not self.settings.overlap:
            self.store.wait_for(sequence)  # a pull that follows must see it

    def _send(self, gradients: Sequence[Tensor | None], index: int) -> int:
        update = index not in (NO_UPDATE, ASSIGN, OVERWRITE)
        # what is overwritten comes before the gradients of the batches that are pending
        leases, self.pending = ([], self.pending) if index == OVERWRITE else (self.pending, [])
        base = self._tensors if update and self.settings.staleness == "delay_compensation" else []
        return self.store.push(
            gradients,
            optimizer=index,
            leases=leases,
            groups=self._groups[index].take() if index >= 0 and self.store.is_coordinator else None,
            buffers=[] if index in (ASSIGN, OVERWRITE) else list(self.buffers.values()),
            base=base,
        )

    def know_groups(self) -> None:
        """Take the optimizers' hyper-parameters for those that the server has."""
        self._groups = [SentGroups(optimizer) for optimizer in self.optimizers]

    def changed_groups(self, index: int) -> list[dict[str, Any]]:
        """Return what `SentGroups.changed` does for an optimizer."""
        return self._groups[index].changed()

    def _step_locally(self, index: int) -> None:
        self._local_steps[index]()
        self._counts[OUTER] += 1
        if self._counts[OUTER] >= self.settings.local_steps * len(self.optimizers):
            self._push_way()

    def _push_way(self) -> None:
        self._counts[OUTER] = 0
        pairs = enumerate(zip(self._base, self._tensors, strict=True))
        ways = [base - p.detach() if i in self._stepped else None for i, (base, p) in pairs]
        self.store.wait_for_slack()
        self.store.wait_for(self._send(ways, OUTER))
        self.own_steps = [steps + 1 for steps in self.own_steps]
        self.pull()
