"""``lightning-accel compare``: paired runs with and without the accelerators, and what they say."""

import contextlib
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from lightning_accel.cli.compare.arms import ACCELERATED, PLAIN, PLAIN_AGAIN, arms, fingerprint
from lightning_accel.cli.compare.progress import RunProgress
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.launch import Interrupted
from lightning_accel.cli.results import cleaned, cleaned_override, save_configuration
from lightning_accel.cli.terminal import open_console
from lightning_accel.evidence.alternatives import advise
from lightning_accel.evidence.budget import Share, write_budgets
from lightning_accel.evidence.comparison import Comparison, compare_runs
from lightning_accel.evidence.dossier.gather import resumable
from lightning_accel.evidence.goal import Goal, TargetRule, derive_goal
from lightning_accel.evidence.measured_runs.ledger import RunLedger
from lightning_accel.evidence.measured_runs.pairs import run_pairs
from lightning_accel.evidence.measured_runs.runs import Run
from lightning_accel.evidence.measured_runs.workers import Arm, WorkerError
from lightning_accel.evidence.page import Report, write_page
from lightning_accel.evidence.plots import MissingPackageError, plot_metric_against_time
from lightning_accel.evidence.summaries import write_summary
from lightning_accel.evidence.tables import budget_table, comparison_table
from lightning_accel.measure import environment

_LIKE = 2
_SAME = "Both arms are the same: whatever differs is chance."


def compare(cfg: DictConfig) -> float:
    """Run the pairs, write rows, picture and page, print the table, and return how many times faster a fit is.

    Raises:
        UsageError: If ``cfg.compare`` asks for something impossible, or the folder holds rows of a former comparison.
        WorkerError: If a run failed; rows of finished runs are kept.
        Interrupted: On Ctrl-C; what was measured so far is reported and kept.
        OSError: If the folder cannot be written.
    """
    if cfg.get("selection") is not None:  # experiments that compare accuracies, not times
        from lightning_accel.cli.compare.feature_selection import compare_selection

        return compare_selection(cfg)
    check(cfg)
    chosen = arms(cfg)
    folder = Path(cfg.paths.output_dir)
    ledger = _ledger(cfg, folder)
    save_configuration(cfg, folder)
    console = open_console()
    where: dict[str, str | int] = environment()
    note = _SAME if cfg.compare.aa else ""
    if cfg.compare.resume and not ledger.runs:
        console.print(f"No rows in {os.path.relpath(folder)} to go on with: starting anew.", markup=False)
    try:
        with RunProgress(console, [a.name for a in chosen], cfg.compare.pairs, ledger) as progress, usage_errors():
            where = run_pairs(
                chosen,
                ledger,
                pairs=cfg.compare.pairs,
                seed=cfg.seed,
                before_run=progress.before_run,
                after_run=progress.after_run,
            )
    except KeyboardInterrupt:
        where["threads"] = cfg.compare.threads or where["threads"]
        done = len(ledger.complete_pairs([a.name for a in chosen])[PLAIN])
        note = f"Interrupted after {done} of {cfg.compare.pairs} pairs. {note}".strip()
        _report(cfg, ledger, chosen, where, console, note=note)
        short = os.path.relpath(folder)
        command = resumable(_settings(cfg)["command"])
        raise Interrupted(
            f"{note} Rows are kept in {short}; go on with:\n{command} hydra.run.dir={short} compare.resume=true"
            f" compare.pairs={cfg.compare.pairs}"
        ) from None
    except WorkerError as error:
        ledger.export()
        console.print(error.details, markup=False, style="dim", soft_wrap=True)
        raise
    comparison = _report(cfg, ledger, chosen, where, console, note=note)
    assert comparison is not None
    ratio = comparison.fit.ratio
    assert ratio is not None
    return ratio.median


def check(cfg: DictConfig) -> None:
    """Refuse what can not be run, before anything is started.

    Raises:
        UsageError: With the key and what it must be.
    """
    settings = cfg.compare
    for name, least in (("pairs", 1), ("threads", 1)):
        value = settings[name]
        if value is None and name == "threads":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"`compare.{name}` must be an integer >= {least}, got {value}.")
    if settings.mode not in (None, "max", "min"):
        raise UsageError(f"`compare.mode` must be max, min or null, got {settings.mode}.")
    if isinstance(settings.target, str):
        try:
            TargetRule.parse(settings.target)
        except ValueError as error:
            raise UsageError(str(error).replace("`target`", "`compare.target`")) from None
    elif settings.target is not None and not _is_number(settings.target):
        raise UsageError(
            f"`compare.target` must be a number, a rule such as plain_best-0.005, or null, got {settings.target}."
        )
    if not _is_number(settings.margin) or settings.margin < 0:
        raise UsageError(f"`compare.margin` must be a number >= 0 in the metric's unit, got {settings.margin}.")
    if settings.price_per_hour is not None and not _is_number(settings.price_per_hour):
        raise UsageError(f"`compare.price_per_hour` must be a number or null, got {settings.price_per_hour}.")
    if settings.price_per_hour is not None and settings.price_per_hour < 0:
        raise UsageError(f"`compare.price_per_hour` must be >= 0, got {settings.price_per_hour}.")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UsageError(f"`seed` must be an integer >= 0, got {cfg.seed}; pairs need seeds they can share.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ledger(cfg: DictConfig, folder: Path) -> RunLedger:
    try:
        return RunLedger(folder, fingerprint=fingerprint(cfg), resume=cfg.compare.resume)
    except FileExistsError as error:
        if error.errno is not None:
            raise
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """What a worker refuses as a mistake of the user is one here, too."""
    try:
        yield
    except WorkerError as error:
        if error.kind == UsageError.__name__:
            raise UsageError(str(error)) from None
        raise


def _report(
    cfg: DictConfig,
    ledger: RunLedger,
    chosen: Sequence[Arm],
    where: dict[str, str | int],
    console: Console,
    *,
    note: str,
) -> Comparison | None:
    """Write what there is, print it and return the comparison that decides; ``None`` without a complete pair."""
    names = [arm.name for arm in chosen]
    runs = ledger.complete_pairs(names)
    written = [ledger.path, *ledger.export()]
    comparisons: list[Comparison] = []
    advice = ""
    messages: list[str] = []
    budgets: dict[str, list[Share]] = {}
    if runs[PLAIN]:
        goal = _goal(cfg, runs[PLAIN])
        candidate = PLAIN_AGAIN if cfg.compare.aa else ACCELERATED
        comparisons = [
            compare_runs(
                runs,
                baseline,
                candidate,
                goal=goal,
                price_per_hour=cfg.compare.price_per_hour,
                currency=cfg.compare.currency,
                margin=cfg.compare.margin,
            )
            for baseline in names
            if baseline != candidate
        ]
        against_plain = [name for name in names if name not in (PLAIN, candidate)]
        alternatives = [compare_runs(runs, PLAIN, name, goal=goal, margin=cfg.compare.margin) for name in against_plain]
        messages = shown_messages(runs[candidate][-1])
        budgets = write_budgets(runs)
        advice = advise(comparisons, alternatives)
        report = Report(comparisons, ledger.runs, where, _settings(cfg), messages, note, budgets, alternatives, advice)
        written.append(write_summary(report, ledger.folder / "comparison.json"))
        try:
            picture = None
            if goal is not None:
                picture = ledger.folder / "accuracy_against_time.png"
                plot_metric_against_time(runs, goal, picture)
                written.append(picture)
            write_page(report, ledger.folder / "report.html", picture=picture)
            written.append(ledger.folder / "report.html")
        except MissingPackageError as error:
            console.print(f"Without {error}", markup=False, style="yellow", soft_wrap=True)
    for comparison in comparisons:
        console.print(comparison_table(comparison))
    if budgets:
        console.print(budget_table(budgets))
    for message in messages:
        console.print(message, markup=False, style="dim", soft_wrap=True)
    for comparison in comparisons:
        console.print(comparison.headline, markup=False, style="bold", soft_wrap=True)
    if advice:
        console.print(advice, markup=False, style="bold", soft_wrap=True)
    for comparison in comparisons:
        if comparison.money is not None:
            money = comparison.money
            console.print(
                f"Of 100 device-hours, {100 * money.candidate_hours / money.baseline_hours:.1f} remain: saves "
                f"{100 * money.saved_per_hour:.2f} {money.currency}.",
                markup=False,
            )
    if cfg.compare.aa:
        console.print(_SAME, markup=False)
    for path in written:
        console.print(os.path.relpath(path), markup=False, style="dim", soft_wrap=True)
    return comparisons[0] if comparisons else None


def _goal(cfg: DictConfig, baseline: Sequence[Run]) -> Goal | None:
    settings = cfg.compare
    metric = settings.metric or cfg.optimized_metric
    mode = settings.mode or (cfg.optimized_mode if metric == cfg.optimized_metric else None)
    try:
        return derive_goal(baseline, metric=metric, mode=mode, target=settings.target)
    except ValueError as error:
        raise UsageError(f"{error} Set it with compare.metric=NAME; the rows are kept.") from None


def shown_messages(run: Run) -> list[str]:
    """Return what the accelerators said in a run, fit to be shown to anyone.

    Of messages that differ in numbers only, such as one a phase, the first two are kept and the rest counted.
    """
    kinds: dict[str, list[str]] = {}
    for message in dict.fromkeys(run.messages):
        kinds.setdefault(re.sub(r"\d+", "0", message), []).append(str(cleaned(message)))
    shown = []
    for kind in kinds.values():
        shown += kind[:_LIKE]
        if len(kind) > _LIKE:
            shown[-1] += f" (and {len(kind) - _LIKE} more like this)"
    return shown


def _settings(cfg: DictConfig) -> dict[str, str]:
    """Return what was compared, fit to be shown to anyone."""
    accelerators = {} if cfg.compare.aa else cfg.get("callbacks") or {}
    epochs = cfg.trainer.get("max_epochs")
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    settings = {
        "model": str(cfg.model.get("_target_", "")),
        "data": str((cfg.get("data") or {}).get("_target_", "")),
        "accelerators": ", ".join(accelerators) or "none",
        "strategy": str(cfg.trainer.get("strategy", "auto")),
        "epochs": "" if epochs is None else str(epochs),
        "threads": str(cfg.compare.threads or "torch's own choice"),
        "caches": "empty before every run" if cfg.compare.cold else "kept between runs",
        "command": shlex.join(["lightning-accel", "compare", *map(cleaned_override, overrides)]),
    }
    return {name: str(cleaned(text)) for name, text in settings.items() if text}
