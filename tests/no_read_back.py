"""A device that is not there: its tensors have shapes and no numbers, and who looks at one is told so.

It is torch's "meta" device. While `Watch.strict` holds, whatever would make the host wait for a device raises
`ReadBackError`: looking at a number, results whose shape depends on numbers, and copies between host and device that
are not asked to go by themselves. At other times a number that is looked at is a stand-in.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
aten = torch.ops.aten
LOOKS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
STAND_INS = {torch.bool: False, torch.int64: 1, torch.int32: 1}


class ReadBackError(RuntimeError):
    """The host would wait for the device here."""


class Watch(TorchDispatchMode):
    """Raise where the host would wait for a device, as long as ``strict``; count the operations on the device."""

    def __init__(self):
        super().__init__()
        self.strict = False
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kinds = {t.device.type for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if DEVICE.type in kinds:
            self.operations.append(func)
        waits = _waits(func, args, kwargs, kinds)
        if waits and self.strict:
            raise ReadBackError(f"{func} waits for the device")
        if (waits and func in LOOKS) or _leaves(func, args, kwargs):
            return _stand_in(func, args)
        return func(*args, **kwargs)


def _leaves(func, args, kwargs):
    """Whether a copy goes from the device to the host, where there is nothing to be copied."""
    if func is aten._to_copy.default:
        return args[0].is_meta and torch.device(kwargs.get("device") or DEVICE).type != DEVICE.type
    return func is aten.copy_.default and args[1].is_meta and not args[0].is_meta


def _stand_in(func, args):
    if func is aten._local_scalar_dense.default:
        return STAND_INS.get(args[0].dtype, 1.0)
    if func is aten.equal.default:
        return True
    if func is aten._to_copy.default:
        return torch.ones(args[0].shape, dtype=args[0].dtype)
    if func is aten.copy_.default:
        return args[0].fill_(1)
    raise ReadBackError(f"{func} waits for the device")


def _waits(func, args, kwargs, kinds):
    far = DEVICE.type in kinds
    if func in LOOKS:
        return far
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        single = func is not aten.index.Tensor and args[2].numel() == 1  # becomes a `masked_fill`
        return far and bool(masks) and not single
    if func is aten._to_copy.default:
        to = kwargs.get("device")
        return to is not None and _crosses(args[0].device, torch.device(to)) and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        waits = len(args) < 3 or not args[2]
        return _crosses(args[0].device, args[1].device) and waits and not kwargs.get("non_blocking")
    if func is aten._foreach_copy_.default:
        waits = len(args) < 3 or not args[2]
        pairs = zip(args[0], args[1], strict=True)
        return any(_crosses(a.device, b.device) for a, b in pairs) and waits and not kwargs.get("non_blocking")
    return False


def _crosses(one, other):
    return (one.type == DEVICE.type) != (other.type == DEVICE.type)


class Batches:
    """Batches that are there; a list would count as several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class NoAccelerator(Accelerator):
    """Sets up nothing."""

    def setup_device(self, device):
        """There is no device."""

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        """Nothing was set up."""

    @staticmethod
    def parse_devices(devices):
        return 1

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "none"


class Begin(pl.Callback):
    """Turn the watch on before any other callback sees a batch, from the given one on."""

    def __init__(self, watch, first):
        self.watch, self.first = watch, first

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.watch.strict = batch_idx >= self.first


class End(pl.Callback):
    """Turn it off after every other callback has seen the batch."""

    def __init__(self, watch):
        self.watch, self.steps = watch, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.watch.strict = False
        self.steps.append(trainer.global_step)


class LastBatch(pl.Callback):
    """Turn the watch off where an epoch ends, which may look at numbers: stands before the callback that is tested."""

    def __init__(self, watch):
        self.watch = watch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            self.watch.strict = False


def fit(watch, module, callbacks, batches, *, epochs=1, first=0, **options):
    """Run a whole fit on the device; every step of it from batch ``first`` on is watched, but what ends an epoch."""
    end = End(watch)
    trainer = pl.Trainer(
        strategy=SingleDeviceStrategy(device=DEVICE, accelerator=NoAccelerator()),
        max_epochs=epochs,
        callbacks=[Begin(watch, first), LastBatch(watch), *callbacks, end],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    try:
        trainer.fit(module, Batches(batches))
    finally:
        watch.strict = False
    return trainer, end.steps
