"""Rows of the contract that an engine can break, for asynchronous SGD on Ray; the others are one strategy's code."""

from dataclasses import replace

import pytest
import test_row_01_resume as resume
import test_row_02_neutral as neutral
import test_row_05_composition as composition
import test_row_06_trainer_features as features
from accelerators import by_name

from lightning_accel.async_sgd.ray_engine.cluster import connected
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.strategies.for_lightning import AsyncSGDStrategy

pytestmark = pytest.mark.slow

ON_RAY = {"engine": "ray", "shards": 2, "heartbeat_seconds": 300.0}
ENTRY = replace(
    by_name("async_sgd"),
    strategy=lambda: AsyncSGDStrategy(**ON_RAY),
    neutral_strategy=lambda: AsyncSGDStrategy(**ON_RAY),
)


@pytest.fixture(autouse=True, scope="module")
def _ray():
    with connected(RayOptions(), cores=2):
        yield


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    resume.test_resumed_run_equals_uninterrupted_run(ENTRY, 9, tmp_path)


def test_neutral_setting_equals_plain_training(tmp_path):
    neutral.test_neutral_setting_equals_plain_training(ENTRY, tmp_path)


def test_layers_are_exchanged_while_it_trains(tmp_path):
    composition.check_fit([by_name("rank_quantization"), ENTRY], tmp_path)


@pytest.mark.parametrize("name", ["bf16-mixed", "double", "average before"])
def test_neutral_setting_changes_nothing(name, tmp_path):
    feature = next(feature for feature in features.FEATURES if feature.name == name)
    features.test_neutral_setting_changes_nothing(ENTRY, feature, tmp_path)
