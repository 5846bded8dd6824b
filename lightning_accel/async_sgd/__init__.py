"""Asynchronous SGD with a parameter server: workers of uneven speed, none of which can hold up or harm the others."""

from lightning_accel.async_sgd.estimate import TrafficEstimate, estimate_traffic
from lightning_accel.async_sgd.policy.encoding.compression import Compression
from lightning_accel.async_sgd.policy.leases import Lease, LeaseBook
from lightning_accel.async_sgd.policy.pushes import LogEntry, Push
from lightning_accel.async_sgd.policy.replay import replay
from lightning_accel.async_sgd.policy.rules import compensate_delay, learning_rate_weight
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.client import SharedMemoryStore
from lightning_accel.async_sgd.shared_memory.spawn import run_workers
from lightning_accel.async_sgd.shared_memory.supervisor import WorkerFailedError
from lightning_accel.async_sgd.store import ParameterStore, Snapshot, Statistics
from lightning_accel.async_sgd.worker import Worker

__all__ = [
    "Compression",
    "Lease",
    "LeaseBook",
    "LogEntry",
    "ParameterServer",
    "ParameterStore",
    "Push",
    "Settings",
    "SharedMemoryStore",
    "Snapshot",
    "Statistics",
    "TrafficEstimate",
    "Worker",
    "WorkerFailedError",
    "compensate_delay",
    "estimate_traffic",
    "learning_rate_weight",
    "replay",
    "run_workers",
]
