"""``lightning-accel bench SUITE``: the micro-benchmarks of a core against its peers, on this machine.

A suite is a module of `lightning_accel.bench.suites`; its ``rows(*, quick, device)`` yields `BenchRow`s.
"""

import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lightning_accel.bench.suites import suites
from lightning_accel.cli.compare.arms import plain_and_accelerated
from lightning_accel.cli.compare.command import shown_messages
from lightning_accel.cli.errors import UsageError, did_you_mean
from lightning_accel.cli.terminal import open_console
from lightning_accel.evidence.growth.curves import GrowthRow
from lightning_accel.evidence.growth.plot import plot_growth
from lightning_accel.evidence.growth.table import write_growth
from lightning_accel.evidence.plots import MissingPackageError, plot_bench
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.evidence.tables import bench_table, write_bench
from lightning_accel.measure import environment


def bench(cfg: DictConfig) -> None:
    """Measure the rows of ``cfg.suite`` (or of all), print them as a table and write ``bench.{json,csv,md,png}``.

    Curves of cost are also written as ``growth.{json,md}`` and drawn, ``growth_CORE.png``.

    Raises:
        UsageError: If there is no such suite or no such device.
    """
    chosen = suites() if cfg.suite == "all" else [str(cfg.suite)]
    for name in chosen:
        if name not in suites():
            raise UsageError(f"`{name}` is no suite. {did_you_mean(name, [*suites(), 'all'])}")
    device = _device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    folder = Path(cfg.paths.output_dir)
    console = open_console()
    rows: list[BenchRow] = []
    try:
        with console.status("") as status:
            for row in _measured(chosen, cfg, device=device):
                rows.append(row)
                ratio = row.ratio.median
                console.print(f"{row.suite}: {row.case}: {row.variant} {ratio:.2f}", markup=False, style="dim")
                status.update(f"{len(rows)} rows measured")
    finally:
        if rows:  # what was measured before Ctrl-C is kept
            paths = write_bench(rows, folder, environment=environment(device))
    if not rows:
        console.print(f"{', '.join(chosen) or 'No suite'}: nothing was measured.", markup=False)
        return
    console.print(bench_table(rows))
    growth = [row for row in rows if isinstance(row, GrowthRow)]
    if growth:
        paths += write_growth(growth, folder)
    try:
        plot_bench(rows, folder / "bench.png")
        paths.append(folder / "bench.png")
        paths += plot_growth(growth, folder)
    except MissingPackageError as error:
        console.print(f"No picture: {error}", markup=False, style="dim", soft_wrap=True)
    for path in paths:
        console.print(os.path.relpath(path), markup=False, style="dim", soft_wrap=True)


def _measured(chosen: list[str], cfg: DictConfig, *, device: str) -> Iterator[BenchRow]:
    for name in chosen:
        rows = importlib.import_module(f"lightning_accel.bench.suites.{name}").rows
        given: dict[str, Any] = {"device": device, "make_fits": plain_and_accelerated, "shown_messages": shown_messages}
        asked = inspect.signature(rows).parameters
        yield from rows(
            **{key: given[key] if key in given else cfg[key] for key in asked if key in given or key in cfg}
        )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"`device` must be a device of this machine, got {name}: {error}") from None
    return name
