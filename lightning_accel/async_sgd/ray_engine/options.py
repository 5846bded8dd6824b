"""Where a run on Ray takes place, and what it may lose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_accel.arguments import check_integer, check_number, check_switch


@dataclass(frozen=True)
class RayOptions:
    """Options of the Ray engine; the rest is in `Settings`.

    Args:
        address: Of a cluster that was started with ``ray start`` (``auto``: the one of this machine). None: Ray is
            started here, on loopback, with a token of its own, and ended with the run.
        shards: Processes among which the parameters are shared out, whole parameters each, >= 1. Optimizers that do
            not come with torch keep one shard, for they may treat parameters together.
        shard_snapshot_steps: Versions after which each shard is copied to the head of the run, behind the writes,
            >= 1. A shard that dies comes back as it was then: it loses twice so many versions of its part at most.
        cpus_per_worker: Cores of a machine that one worker counts for when Ray places it, > 0.
        allow_without_token: Whether a cluster may be used although Ray runs there without ``RAY_AUTH_MODE=token``:
            then everybody who reaches one of its ports can run code on it.
        gpus_per_worker: The same of accelerators, >= 0.
        runtime_env: Of Ray, for workers and shards of a cluster (``working_dir``, ``env_vars``); None for none.

    Raises:
        TypeError: If a value is of another kind.
        ValueError: If a value is out of its range.
    """

    address: str | None = None
    shards: int = 1
    shard_snapshot_steps: int = 50
    cpus_per_worker: float = 1.0
    allow_without_token: bool = False
    gpus_per_worker: float = 0.0
    runtime_env: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.address is not None and not isinstance(self.address, str):
            raise TypeError(f"`address` must be a text such as 'auto' or '10.0.0.1:6379', got {self.address!r}.")
        check_integer("shards", self.shards, at_least=1)
        check_integer("shard_snapshot_steps", self.shard_snapshot_steps, at_least=1)
        check_number("cpus_per_worker", self.cpus_per_worker, above=0.0)
        check_number("gpus_per_worker", self.gpus_per_worker, at_least=0.0)
        check_switch("allow_without_token", self.allow_without_token)
        if self.runtime_env is not None:
            if not isinstance(self.runtime_env, Mapping):
                raise TypeError(f"`runtime_env` must map names to values as Ray expects it, got {self.runtime_env!r}.")
            object.__setattr__(self, "runtime_env", _plain(self.runtime_env))  # Ray knows no configuration's mappings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
