"""The low-rank studies compose to what their comments promise."""

import pytest

from lightning_accel.cli.compare.arms import ACCELERATED, PLAIN, arms
from lightning_accel.cli.compare.command import check
from lightning_accel.cli.compose import compose
from lightning_accel.cli.fit import build

STUDIES = ["mlp_low_rank", "vit_low_rank", "resnet18_low_rank"]


@pytest.fixture(params=STUDIES)
def config(request, tmp_path):
    return compose("compare", [f"experiment={request.param}", f"paths.output_dir={tmp_path}"])


def test_both_arms_train_alike_for_equally_many_epochs(config, tmp_path):
    check(config)
    plain, fast = arms(config)
    assert (plain.name, fast.name) == (PLAIN, ACCELERATED)
    assert plain.make.config == fast.make.config
    without, with_callbacks = (
        build(config, accelerators=given, monitoring=False, loggers=False, root_dir=tmp_path) for given in (False, True)
    )
    assert [type(callback).__name__ for callback in with_callbacks.accelerators] == ["RankQuantization"]
    assert without.accelerators == []
    assert without.trainer.max_epochs == with_callbacks.trainer.max_epochs
    assert without.model.hparams == with_callbacks.model.hparams
    assert without.data.seed == with_callbacks.data.seed


def test_dense_warm_up_is_short_and_seeds_are_not_those_of_tuning(config):
    assert 1 <= config.callbacks.rank_quantization.when <= 0.4 * config.trainer.max_epochs
    assert config.seed > 100
    assert config.compare.target == "pair_best-0.005"


def test_enough_images_to_tell_half_a_point(config, tmp_path):
    data = build(config, accelerators=False, monitoring=False, loggers=False, root_dir=tmp_path).data
    data.prepare_data()
    data.setup("fit")
    batches = min(len(data.val_dataloader()), config.trainer.get("limit_val_batches", 10**6))
    assert min(batches * data.batch_size, len(data.parts[1])) >= 2 / 0.005
