"""Which rows of the contract run on Ray too, and why the others need not; every row of shared memory is in one table.

A row is ``module::test[arguments]``, such as ``test_row_01_resume::test_resumed_run_equals_uninterrupted_run[9]``.
Workers, shards and the head of a run take part in ``Trainer.fit`` alone. What a row asks for before or after it is the
same code for every engine, and so is all that the worker's Trainer does between two calls of its store.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _pytest.mark import ParameterSet
from accelerators import ACCELERATORS, Accelerator, by_name

RESUME, CHECKPOINTS, FEATURES = "test_row_01_resume::", "test_row_03_checkpoints::", "test_row_06_trainer_features::"
COMPOSITION, LOADING, LENGTHS = "test_row_05_composition::", "test_row_12_own_loading::", "test_row_14_lengths::"
NEUTRAL, ACTS = f"{FEATURES}test_neutral_setting_changes_nothing", f"{FEATURES}test_accelerator_acts"

RUN = (
    f"{RESUME}test_resumed_run_equals_uninterrupted_run[9]",
    "test_row_02_neutral::test_neutral_setting_equals_plain_training",
    f"{CHECKPOINTS}test_same_trainer_tests_its_best_checkpoint",
    f"{CHECKPOINTS}test_run_goes_on_from_a_checkpoint_of_a_plain_run",
    f"{COMPOSITION}test_pair_composes[rank_quantization-async_sgd]",
    f"{COMPOSITION}test_all_together_compose",
    f"{NEUTRAL}[bf16-mixed]",
    f"{NEUTRAL}[double]",
    f"{NEUTRAL}[average before]",
    f"{ACTS}[clipping by norm]",
    f"{ACTS}[two optimizers]",
    f"{FEATURES}test_fast_dev_run",
    f"{FEATURES}test_two_fits_with_one_trainer_and_validate_before",
    "test_row_07_nothing_to_act_on::test_frozen_by_the_user_stays_frozen",
    "test_row_08_both_distributions::test_pytorch_lightning_trains_to_the_same_weights",
    f"{LOADING}test_resumed_run_asks_the_module",
    f"{LENGTHS}test_data_without_a_length[{{'max_epochs': 4}}]",
    f"{LENGTHS}test_limits_of_the_trainer[{{'val_check_interval': 2}}]",
)

_SAME_FIT = "the same fit as its neutral row, which also compares every bit with plain training"
_GRADIENTS = "acts on gradients before they reach the store, which sees one push a step as without it"
_READING = "a fit that another row runs, then a file is read in the caller's process, where no engine is"
_ORDER = "the order of the callbacks is the Trainer's; the pair runs in the other order, or all together"
_TOGETHER = "acts beside all others in the row of all together"
_HAND = "`test_ray_engine` compares two optimizers that are stepped by hand bit for bit with plain training"
_SCHEDULE = "`test_ray_engine` compares two schedules bit for bit with plain training"
_MOMENTUM = "`test_ray_engine` compares SGD with momentum bit for bit with plain training"
_AVERAGE = "averages are made in the worker's Trainer, as in the neutral row of the average before"
_ACCUMULATION = "`test_ray_engine` compares accumulated and clipped gradients bit for bit with plain training"
_REFUSED = "Lightning refuses it before any engine is asked"
_ENDS = "ends in the worker's Trainer, which says so as after its last epoch"
_SHORTER = "shortens the order of batches that the worker hands in, which may have any length"

REASONS = {
    f"{RESUME}test_resumed_run_equals_uninterrupted_run[6]": "the same cut as at step 9, with no batch in hand",
    f"{RESUME}test_resumed_run_equals_uninterrupted_run[12]": "the same cut as at step 9, with no batch in hand",
    f"{RESUME}test_resumed_run_equals_uninterrupted_run[16]": "the middle of another epoch, as step 9",
    f"{CHECKPOINTS}test_new_trainer_with_the_callback_tests_a_checkpoint[False]": _READING,
    f"{CHECKPOINTS}test_new_trainer_with_the_callback_tests_a_checkpoint[True]": _READING,
    f"{CHECKPOINTS}test_new_trainer_without_the_callback_tests_a_checkpoint[False]": _READING,
    f"{CHECKPOINTS}test_new_trainer_without_the_callback_tests_a_checkpoint[True]": _READING,
    f"{CHECKPOINTS}test_documented_helper_loads_a_checkpoint[False]": _READING,
    f"{CHECKPOINTS}test_documented_helper_loads_a_checkpoint[True]": _READING,
    f"{COMPOSITION}test_pair_composes[sequential_freezing-async_sgd]": _TOGETHER,
    f"{COMPOSITION}test_pair_composes[l1inf_projection-async_sgd]": _TOGETHER,
    f"{COMPOSITION}test_pair_composes[multilevel_projection-async_sgd]": _TOGETHER,
    f"{COMPOSITION}test_pair_composes[intra_stream_scheduling-async_sgd]": _TOGETHER,
    f"{COMPOSITION}test_pair_composes[async_sgd-rank_quantization]": _ORDER,
    f"{COMPOSITION}test_pair_composes[async_sgd-sequential_freezing]": _ORDER,
    f"{COMPOSITION}test_pair_composes[async_sgd-l1inf_projection]": _ORDER,
    f"{COMPOSITION}test_pair_composes[async_sgd-multilevel_projection]": _ORDER,
    f"{COMPOSITION}test_pair_composes[async_sgd-intra_stream_scheduling]": _ORDER,
    f"{NEUTRAL}[accumulation across a phase border]": _ACCUMULATION,
    f"{NEUTRAL}[clipping by norm]": _GRADIENTS,
    f"{NEUTRAL}[clipping by value]": _GRADIENTS,
    f"{NEUTRAL}[manual optimization]": _HAND,
    f"{NEUTRAL}[two optimizers]": _HAND,
    f"{NEUTRAL}[schedule]": _SCHEDULE,
    f"{NEUTRAL}[sgd with momentum]": _MOMENTUM,
    f"{NEUTRAL}[average behind]": _AVERAGE,
    f"{NEUTRAL}[stochastic average before]": _AVERAGE,
    f"{NEUTRAL}[compiled]": _REFUSED,
    f"{NEUTRAL}[limited steps]": _ENDS,
    f"{ACTS}[bf16-mixed]": _SAME_FIT,
    f"{ACTS}[double]": _SAME_FIT,
    f"{ACTS}[accumulation across a phase border]": _ACCUMULATION,
    f"{ACTS}[clipping by value]": _GRADIENTS,
    f"{ACTS}[manual optimization]": _HAND,
    f"{ACTS}[schedule]": _SCHEDULE,
    f"{ACTS}[sgd with momentum]": _MOMENTUM,
    f"{ACTS}[average before]": _SAME_FIT,
    f"{ACTS}[average behind]": _AVERAGE,
    f"{ACTS}[stochastic average before]": _AVERAGE,
    f"{ACTS}[compiled]": _REFUSED,
    f"{ACTS}[limited steps]": _ENDS,
    f"{LOADING}test_documented_helper_asks_the_module": _READING,
    f"{LOADING}test_trainer_without_the_callback_asks_the_module": _READING,
    f"{LENGTHS}test_data_without_a_length[{{'max_steps': 24}}]": _ENDS,
    f"{LENGTHS}test_time_limit_that_does_not_bind_changes_nothing": "the clock is that of the worker's Trainer",
    f"{LENGTHS}test_limits_of_the_trainer[{{'overfit_batches': 2}}]": _SHORTER,
    f"{LENGTHS}test_limits_of_the_trainer[{{'limit_train_batches': 3}}]": _SHORTER,
    f"{LENGTHS}test_limits_of_the_trainer[{{'max_steps': 15}}]": _ENDS,
}
"""Rows that hold for shared memory and are not run on Ray, each with why it would show nothing that others do not."""

Call = tuple[Callable[..., Any], dict[str, Any]]


def rows_of(entry: Accelerator) -> dict[str, Call]:
    """Return every row that an entry of the table has: its test, and the arguments but for folders and logs."""
    found: dict[str, Call] = {}
    for path in sorted(Path(__file__).parent.glob("test_row_*.py")):
        for name, function in vars(importlib.import_module(path.stem)).items():
            if name.startswith("test_"):
                for row, arguments in _cases(entry, function):
                    found[f"{path.stem}::{name}{row}"] = function, arguments
    return found


def on_ray(arguments: dict[str, Any], entry: Accelerator) -> dict[str, Any]:
    """Return the arguments of a row with another entry in the place of its own."""
    return {name: entry if value is by_name(entry.name) else value for name, value in arguments.items()}


def _cases(entry: Accelerator, function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parameters of a test that are the entry's, with a text for each choice of them."""
    wanted = inspect.signature(function).parameters
    axes: list[list[dict[str, Any]]] = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0]
            axes.append([_named(names, value) for value in mark.args[1]])
    for chosen in itertools.product(*reversed(axes)):
        arguments = {name: value for part in chosen for name, value in part.items()}
        mine = arguments.get("entry") is entry or entry.name in arguments.get("names", ())
        if "entry" not in wanted and "names" not in wanted:
            mine = function.__name__ == "test_all_together_compose"
        if mine:
            texts = [_text(value) for name, value in arguments.items() if name != "entry"]
            yield (f"[{'-'.join(texts)}]" if texts else ""), arguments


def _named(names: Any, value: Any) -> dict[str, Any]:
    values = value.values if isinstance(value, ParameterSet) else value
    if isinstance(names, str) and "," not in names:
        return {names: values[0] if isinstance(value, ParameterSet) else values}
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    return dict(zip(listed, values, strict=True))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(getattr(value, "name", value))


ENTRY = next(entry for entry in ACCELERATORS if entry.name == "async_sgd")
