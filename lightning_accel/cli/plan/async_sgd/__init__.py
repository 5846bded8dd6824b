"""Which of lock-step and asynchronous training is expected to win, and with which settings."""

import copy
import socket
import statistics
import threading
import time
from dataclasses import dataclass

from rich.table import Table

from lightning_accel.async_sgd import TrafficEstimate, estimate_traffic
from lightning_accel.async_sgd.estimate import copy_speed
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.cli.plan import Scene
from lightning_accel.cli.plan.async_sgd.scaling import machine_costs, show_scaling
from lightning_accel.measure import time_interleaved, undisturbed

_SLOWDOWNS = (1.0, 1.5, 2.0, 3.0, 5.0)
_ROUNDS = 9
_LINK_BYTES = 1 << 26  # most that is sent to measure a link
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Measured:
    """What the estimate is made of.

    Attributes:
        step_seconds: Of a training step, forward, backward and update.
        apply_seconds: Of the update alone; None if it could not be measured.
        how: How the step was measured.
    """

    step_seconds: float
    apply_seconds: float | None
    how: str


def sketch(scene: Scene) -> None:
    """Print what was measured, and a line for each speed of the slowest worker."""
    parameters = [p for p in scene.module.parameters() if p.requires_grad]
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    workers = max(2, scene.devices)
    found, copied, link = _measure(scene), copy_speed(nbytes), link_speed(nbytes)
    estimates = {
        slowdown: estimate_traffic(
            step_seconds=found.step_seconds,
            parameter_bytes=nbytes,
            workers=workers,
            slowdown=slowdown,
            copy_bytes_per_second=copied,
            apply_seconds=found.apply_seconds,
            link_bytes_per_second=link,
        )
        for slowdown in _SLOWDOWNS
    }

    def say(text: str) -> None:
        scene.console.print(text, markup=False, soft_wrap=True)

    equal = estimates[1.0]
    say(
        f"async_sgd: {workers} workers; a step takes {1e3 * found.step_seconds:.2f} ms ({found.how}), the update "
        f"{1e3 * equal.apply_seconds:.2f} ms; {nbytes / 1e6:.2f} MB of trained parameters; memory copies "
        f"{copied / 1e9:.1f} GB/s, a loopback socket {link / 1e9:.1f} GB/s"
    )
    scene.console.print(traffic_table(estimates))
    wins = [slowdown for slowdown, estimate in estimates.items() if estimate.advice == "async"]
    if 1.0 in wins:
        say("Asynchrony is expected to win even with equal workers.")
    elif wins:
        say(f"Asynchrony is expected to win from a worker on that is {min(wins):g} times slower than the others.")
    else:
        say("Lock-step is expected to do as well at any of these speeds: use strategy=ddp.")
    most = max(estimates.values(), key=lambda estimate: estimate.server_load)
    shards = f"{most.shards} shard" + ("s: one server would hold the workers up" if most.shards > 1 else "")
    say(f"Then with n_push={equal.n_push} (push and pull take at most 5 % of the steps) and {shards}.")
    say("Throughput alone is estimated here: steps on older parameters may be worth less, see below.")
    if scene.simulation:
        fixed = scene.simulation["link_bytes_per_second"]
        costs = machine_costs(
            step_seconds=found.step_seconds,
            apply_seconds=equal.apply_seconds,
            parameter_bytes=nbytes,
            copy_bytes_per_second=copied,
            link_bytes_per_second=link if fixed is None else float(fixed),
            latency_seconds=float(scene.simulation["latency_seconds"]),
        )
        show_scaling(scene, costs, scene.simulation)


def traffic_table(estimates: dict[float, TrafficEstimate]) -> Table:
    """Return a row for each speed of the slowest worker."""
    table = Table(
        "slowest worker", "async/s", "DDP/s", "ratio", "server busy", "to win", caption="batches a second of all"
    )
    for slowdown, estimate in estimates.items():
        table.add_row(
            "as the others" if slowdown == 1.0 else f"{slowdown:g}x slower",
            f"{estimate.async_throughput:.1f}",
            f"{estimate.lock_step_throughput:.1f}",
            f"{estimate.async_throughput / estimate.lock_step_throughput:.2f}",
            f"{estimate.server_load:.0%}",
            "async_sgd" if estimate.advice == "async" else "ddp",
        )
    return table


def link_speed(nbytes: int) -> float:
    """Measure how many bytes a second go through a TCP connection of this machine to itself, as Gloo's do."""
    nbytes = max(1, min(nbytes, _LINK_BYTES))
    speeds = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            for _ in range(3):
                began = time.perf_counter()
                feeder = threading.Thread(target=sender.sendall, args=(bytes(nbytes),))
                feeder.start()
                left, room = nbytes, bytearray(_CHUNK)
                while left:
                    left -= receiver.recv_into(room, min(left, _CHUNK))
                feeder.join()
                speeds.append(nbytes / (time.perf_counter() - began))
    return max(speeds)


def _measure(scene: Scene) -> Measured:
    if not scene.module.automatic_optimization:
        return Measured(scene.step_seconds, None, "one step of manual optimization, the first")
    with undisturbed(scene.module):
        trial = StepTrial(scene.trainer, scene.module, scene.batch, 0)
        device = scene.module.device
        steps = time_interleaved({"step": trial.step}, rounds=_ROUNDS, warmup=2, device=device)["step"]
        trial.module.backward(trial.forward())
        optimizers = copy.copy(trial.optimizers)
        updates = {"update": lambda: [optimizer.step() for optimizer in optimizers]}
        applied = time_interleaved(updates, rounds=_ROUNDS, warmup=2, device=device)["update"]
    return Measured(statistics.median(steps), statistics.median(applied), "forward, backward and update")
