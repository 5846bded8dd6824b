"""Asynchronous SGD with a parameter server: workers of uneven speed, none of which can hold up or harm the others."""

from lightning_accel.async_sgd.compression import Compression, ErrorFeedback
from lightning_accel.async_sgd.estimate import TrafficEstimate, estimate_traffic
from lightning_accel.async_sgd.policy.leases import Lease, LeaseBook
from lightning_accel.async_sgd.policy.replay import replay
from lightning_accel.async_sgd.policy.rules import compensate_delay, expected_gain, has_slack, learning_rate_weight
from lightning_accel.async_sgd.policy.server import LogEntry, ParameterServer, Push
from lightning_accel.async_sgd.recompute import Recomputation
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.client import SharedMemoryStore
from lightning_accel.async_sgd.shared_memory.spawn import run_workers
from lightning_accel.async_sgd.shared_memory.supervisor import Ending, Remains, Supervisor, WorkerFailedError
from lightning_accel.async_sgd.store import (
    PUSH_STAGES,
    Membership,
    Opening,
    ParameterStore,
    Snapshot,
    Statistics,
)
from lightning_accel.async_sgd.worker import Worker

__all__ = [
    "PUSH_STAGES",
    "Compression",
    "Ending",
    "ErrorFeedback",
    "Lease",
    "LeaseBook",
    "LogEntry",
    "Membership",
    "Opening",
    "ParameterServer",
    "ParameterStore",
    "Push",
    "Recomputation",
    "Remains",
    "Settings",
    "SharedMemoryStore",
    "Snapshot",
    "Statistics",
    "Supervisor",
    "TrafficEstimate",
    "Worker",
    "WorkerFailedError",
    "compensate_delay",
    "estimate_traffic",
    "expected_gain",
    "has_slack",
    "learning_rate_weight",
    "replay",
    "run_workers",
]
