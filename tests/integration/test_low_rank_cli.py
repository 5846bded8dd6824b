"""The callbacks' arguments are understood by LightningCLI, with their types."""

import pytest
from lightning.pytorch.cli import LightningCLI
from low_rank_models import Classifier

from lightning_accel.callbacks import RankQuantization, SequentialFreezing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def callbacks_of(*arguments):
    cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=["--trainer.logger=false", *arguments])
    return [c for c in cli.trainer.callbacks if isinstance(c, RankQuantization | SequentialFreezing)]


def test_arguments_of_both_callbacks():
    ranks, freezing = callbacks_of(
        "--trainer.callbacks+=lightning_accel.callbacks.RankQuantization",
        "--trainer.callbacks.energy=0.9",
        "--trainer.callbacks.when=3",
        "--trainer.callbacks.exclude=[head*]",
        "--trainer.callbacks+=lightning_accel.callbacks.SequentialFreezing",
        "--trainer.callbacks.period_steps=7",
        "--trainer.callbacks.weights=[2.0,1.0]",
    )
    assert (ranks.decision.request.energy, ranks.decision.request.ratio) == (0.9, None)
    assert ranks.decision.request.exclude == ("head*",)
    assert ranks.decision.when == 3
    assert freezing.schedule.period_steps == 7
    assert freezing.schedule.weights == (2.0, 1.0)


def test_no_argument_is_needed():
    (ranks,) = callbacks_of("--trainer.callbacks+=lightning_accel.callbacks.RankQuantization")
    assert ranks.decision.request.ratio == 2.0
    assert ranks.decision.when == "auto"


def test_wrong_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        callbacks_of(
            "--trainer.callbacks+=lightning_accel.callbacks.RankQuantization", "--trainer.callbacks.on_loss=cry"
        )
    assert "on_loss" in capsys.readouterr().err
