"""How training would scale to workers that this machine does not have: table, advice and picture of a simulation."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from rich.table import Table

from lightning_accel.arguments import check_choice, check_integer, check_number
from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.policy.look_ahead import is_normalised
from lightning_accel.async_sgd.simulation.advice import advise, ideal_throughput, reach_of_one_server
from lightning_accel.async_sgd.simulation.costs import Costs, Speeds
from lightning_accel.cli.plan import Scene
from lightning_accel.cli.plan.async_sgd.study import BATCH, LOCK_STEP, Cell, Study, Workers, times
from lightning_accel.evidence.plots import MissingPackageError
from lightning_accel.evidence.scaling_plot import Curve, plot_scaling

_ASK_SECONDS = 5e-5  # that a server takes to look for batches
_PICTURE = "async_scaling.png"


def show_scaling(scene: Scene, costs: Costs, options: Mapping[str, Any]) -> None:
    """Simulate every rule, print what came out, and draw it.

    Args:
        scene: Of the plan.
        costs: On machines like this one, with links like those of ``options``.
        options: ``simulation`` of the configuration.

    Raises:
        ValueError: If an option is out of range.
    """
    workers = Workers(options["speeds"], float(options["slowdown"]), float(options["jitter"]))
    counts, trained = _counts(options, "workers"), _counts(options, "accuracy")
    check_choice("simulation.speeds", workers.speeds, get_args(Speeds))
    check_number("simulation.slowdown", workers.slowdown, at_least=1.0)
    check_integer("simulation.batches", options["batches"], at_least=1)
    counts = sorted({*counts, *trained})
    if not counts:
        return
    with scene.console.status("simulating"):
        made = list(times(costs, workers, counts))
        ideal = {count: ideal_throughput(costs, workers.slowness(count)) for count in counts}
        study = _study(scene, costs, workers, int(options["batches"])) if trained else None
        learnt = [study.cell(rule, count) for count in trained for rule in _rules(made)] if study else []

    def say(text: str) -> None:
        scene.console.print(text, markup=False, soft_wrap=True)

    say(
        f"Simulated, with the server and each worker on a machine of its own like this one, links of "
        f"{costs.link / 1e9:.2g} GB/s and {1e3 * costs.message:.2g} ms; {_speeds(workers)}:"
    )
    scene.console.print(_table(made, learnt, ideal))
    mean = len(workers.slowness(counts[-1])) / ideal[counts[-1]]
    reach = reach_of_one_server(costs, mean)
    say(_advice(costs, workers, max(2, scene.devices), learnt))
    say(f"With a push a step, one server (or its link) holds workers up from about {reach:.0f} workers on.")
    if study is not None:
        say(
            f"Accuracies are those of a small network on {len(study.batches)} batches of {BATCH} digits "
            f"(one process: {study.alone.accuracy:.1%}), at one rate for all: they show which rules bear staleness, "
            "not what your model will reach."
        )
    try:
        path = scene.folder / _PICTURE
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_scaling(
            _curves(made, learnt),
            path,
            conclusion=_conclusion(made, learnt, reach),
            what=f"A small network after {options['batches']} batches of {BATCH} digits",
            ideal=ideal,
            reach=reach if math.isfinite(reach) else None,
            alone=study.alone.accuracy if study else None,
        )
        say(f"Drawn in {os.path.relpath(path)}.")
    except MissingPackageError as error:
        say(f"No picture: {error}")


def machine_costs(
    *,
    step_seconds: float,
    apply_seconds: float,
    parameter_bytes: int,
    copy_bytes_per_second: float,
    link_bytes_per_second: float,
    latency_seconds: float,
) -> Costs:
    """Return the costs of workers and a server that each have a machine like this one.

    Args:
        step_seconds: Of forward, backward and update.
        apply_seconds: Of the update alone.
        parameter_bytes: That a push and a pull move.
        copy_bytes_per_second: Of memory.
        link_bytes_per_second: Between machines.
        latency_seconds: Of a message between machines.
    """
    copied = parameter_bytes / copy_bytes_per_second
    return Costs(
        compute=max(0.1 * step_seconds, step_seconds - apply_seconds),
        push=copied,
        pull=copied,
        apply=apply_seconds + copied,
        update=apply_seconds,
        message=latency_seconds,
        ask=_ASK_SECONDS,
        push_bytes=parameter_bytes,
        pull_bytes=parameter_bytes,
        link=link_bytes_per_second,
    )


def best_of(cells: Sequence[Cell]) -> Cell:
    """Return the cell that learns fastest: the first to come within a point of one process, else the most accurate."""
    return min(cells, key=lambda cell: (cell.seconds, -(cell.accuracy or 0.0)))


def _counts(options: Mapping[str, Any], name: str) -> list[int]:
    counts = list(options[name] or [])
    for count in counts:
        check_integer(f"simulation.{name}", count, at_least=2)
    return counts


def _study(scene: Scene, costs: Costs, workers: Workers, batches: int) -> Study:
    optimizers = scene.trainer.optimizers
    return Study(costs, workers, batches=batches, normalised=bool(optimizers) and is_normalised(optimizers[0]))


def _rules(made: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.rule for cell in made))


def _speeds(workers: Workers) -> str:
    slow = f"{workers.slowdown:g} times slower"
    return {
        "equal": "all equally fast",
        "one_slow": f"one of them {slow}",
        "half_slow": f"half of them {slow}",
        "lognormal": f"speeds log-normal, one in twenty at least {slow} than the median",
    }[workers.speeds]


def _table(made: Sequence[Cell], learnt: Sequence[Cell], ideal: Mapping[int, float]) -> Table:
    """Return a row for each number of workers."""
    table = Table(
        "workers", "ideal/s", "a push a step/s", "server busy", "link busy", "staleness", "local steps/s", "DDP/s"
    )
    if learnt:
        table.add_column("learns fastest")
    table.caption = "batches a second of all workers"
    for count, free in ideal.items():
        cells = {cell.rule: cell for cell in made if cell.workers == count}
        each = cells["inverse"].run
        local = next(cell for rule, cell in cells.items() if rule.startswith("local"))
        row = [
            str(count),
            f"{free:.4g}",
            f"{each.throughput:.4g}",
            f"{each.server_load:.0%}",
            f"{each.link_load:.0%}",
            f"{each.staleness_mean:.0f}",
            f"{local.run.throughput:.4g}",
            f"{cells[LOCK_STEP].run.throughput:.4g}",
        ]
        if learnt:
            trained = [cell for cell in learnt if cell.workers == count]
            row.append(_named(best_of(trained)) if trained else "")
        table.add_row(*row)
    return table


def _named(cell: Cell) -> str:
    when = f"within a point in {cell.seconds:.2g} s" if math.isfinite(cell.seconds or math.inf) else "never as good"
    return f"{cell.rule} ({cell.accuracy:.1%}, {when})"


def _advice(costs: Costs, workers: Workers, count: int, learnt: Sequence[Cell]) -> str:
    """Say what to set for ``count`` workers."""
    found = advise(costs, workers.slowness(count), Settings(), jitter=workers.jitter)
    text = (
        f"For {count} such workers: n_push={found.n_push} n_fetch={found.n_push} and "
        f"{found.shards} shard{'s' if found.shards > 1 else ''}, {found.throughput / found.ideal:.0%} of what they "
        "could do if nobody waited"
    )
    if not learnt:
        return text + "."
    nearest = min({cell.workers for cell in learnt}, key=lambda trained: abs(math.log(trained / count)))
    best = best_of([cell for cell in learnt if cell.workers == nearest])
    what = "strategy=ddp" if best.rule == LOCK_STEP else best.rule
    return f"{text}. What learns fastest with {nearest}: {what}."


def _curves(made: Sequence[Cell], learnt: Sequence[Cell]) -> dict[str, Curve]:
    return {
        rule: Curve(
            {cell.workers: cell.run.throughput for cell in made if cell.rule == rule},
            {cell.workers: cell.accuracy or 0.0 for cell in learnt if cell.rule == rule},
            is_reference=rule == LOCK_STEP,
        )
        for rule in _rules(made)
    }


def _conclusion(made: Sequence[Cell], learnt: Sequence[Cell], reach: float) -> str:
    """Return one sentence on the picture."""
    most = max(cell.workers for cell in made)
    if not learnt:
        cells = {cell.rule: cell.run.throughput for cell in made if cell.workers == most}
        first = max(cells, key=lambda rule: cells[rule])
        return f"One server holds workers up from {reach:.0f} on; of {most} workers, {first} makes the most of them."
    parts: dict[str, list[str]] = {}
    for count in sorted({cell.workers for cell in learnt}):
        best = best_of([cell for cell in learnt if cell.workers == count])
        learns = best.seconds is not None and math.isfinite(best.seconds)
        parts.setdefault(best.rule if learns else "nothing as well as one process", []).append(str(count))
    text = ", ".join(f"{rule} with {' and '.join(counts)}" for rule, counts in parts.items())
    return f"One server holds workers up from {reach:.0f} on; what learns fastest: {text} workers."
