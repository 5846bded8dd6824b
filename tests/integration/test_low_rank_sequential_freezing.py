"""Frozen factors rest exactly, the others move; nothing is left behind."""

import copy
import logging
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from low_rank_models import Classifier, train

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.low_rank import decompose, low_rank_layers, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")

SETTINGS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
}


def low_rank_classifier(kind=Classifier, **settings):
    module = kind(**settings)
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed"))
    assert set(low_rank_layers(module)) >= {"net.0", "net.4"}
    return module


class Watch(Callback):
    """Notes, step by step, which factors moved and which are trainable."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = dict(pl_module.named_parameters())
        if trainer.global_step > self.step:
            moved = {name for name, p in now.items() if not torch.equal(p, self.before[name])}
            resting = {name for name, p in now.items() if not p.requires_grad}
            self.rows.append((trainer.current_epoch, self.step, moved, resting))


def groups(module):
    names = [set(), set()]
    for name, layer in low_rank_layers(module).items():
        for index, group in enumerate(layer.groups()):
            names[index] |= {f"{name}.{factor}" for factor in group}
    return names


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", list(SETTINGS))
def test_frozen_group_rests_exactly_and_moves_in_its_own_phase(optimizer, set_to_none, accumulate, tmp_path):
    class ZeroesGradients(Classifier):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)

    module = low_rank_classifier(ZeroesGradients, optimizer=optimizer, settings=SETTINGS[optimizer])
    watch = Watch()
    train(module, [SequentialFreezing(), watch], tmp_path, epochs=4, accumulate_grad_batches=accumulate)
    names = {name for name, _ in module.named_parameters()}
    assert {row[0] for row in watch.rows} == {0, 1, 2, 3}
    for epoch, _, moved, resting in watch.rows:
        frozen = groups(module)[epoch % 2]
        assert resting == frozen
        assert moved == names - frozen, f"epoch {epoch}"


@pytest.mark.parametrize("period", [2, 5])
def test_phases_in_steps(period, tmp_path):
    module, watch = low_rank_classifier(), Watch()
    train(module, [SequentialFreezing(period_steps=period), watch], tmp_path, epochs=3)
    for _, step, _, resting in watch.rows:
        assert resting == groups(module)[step // period % 2]


def test_start_end_and_final_phase(tmp_path):
    module, watch = low_rank_classifier(), Watch()
    train(module, [SequentialFreezing(start=1, final_trainable=1), watch], tmp_path, epochs=4)
    resting = {epoch: rest for epoch, _, _, rest in watch.rows}
    assert resting == {0: set(), 1: groups(module)[0], 2: groups(module)[1], 3: set()}


def test_everything_is_trainable_afterwards_even_after_an_error(tmp_path):
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("broken on purpose")

    module = low_rank_classifier()
    train(module, [SequentialFreezing()], tmp_path, epochs=1)
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(RuntimeError, match="broken on purpose"):
        train(module, [SequentialFreezing(), Breaks()], tmp_path)
    assert all(p.requires_grad for p in module.parameters())


def test_what_the_user_freezes_and_thaws_on_the_way_is_respected(tmp_path):
    class User(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[4].factor_in.requires_grad_(trainer.current_epoch >= 2)

    module, watch = low_rank_classifier(), Watch()
    module.net[4].factor_in.requires_grad_(False)
    train(module, [User(), SequentialFreezing(), watch], tmp_path, epochs=4)
    for epoch, _, _, resting in watch.rows:
        by_user = {"net.4.factor_in"} if epoch < 2 else set()
        assert resting == groups(module)[epoch % 2] | by_user, epoch
    assert all(p.requires_grad for p in module.parameters())


def test_a_layer_that_the_user_freezes_as_a_whole_rests_as_a_whole(tmp_path):
    class User(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[4].requires_grad_(trainer.current_epoch not in (1, 2, 5))

    module, watch = low_rank_classifier(), Watch()
    train(module, [User(), SequentialFreezing(), watch], tmp_path, epochs=6)
    factors = {f"net.4.{name}" for name in module.net[4].factor_names}
    for epoch, _, _, resting in watch.rows:
        by_user = factors | {"net.4.bias"} if epoch in (1, 2, 5) else set()
        assert resting == groups(module)[epoch % 2] | by_user, epoch
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == factors | {"net.4.bias"}


@pytest.mark.filterwarnings("ignore:the `weight` of the low-rank layer")
@pytest.mark.parametrize("mode", ["sequential", "adaptive"])
def test_fit_goes_on_where_all_low_rank_layers_were_written_into(mode, tmp_path):
    class Bounds(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for layer in low_rank_layers(pl_module).values():
                layer.weight.data.clamp_(-0.1, 0.1)

    module = low_rank_classifier()
    trainer = train(module, [SequentialFreezing(mode=mode), Bounds()], tmp_path, epochs=3)
    assert trainer.global_step == 3 * 6
    assert not low_rank_layers(module)
    assert all(p.requires_grad for p in module.parameters())


def test_logs_phase_frozen_parameters_and_step_time(tmp_path):
    logger = CSVLogger(tmp_path)
    module = low_rank_classifier()
    trainer = train(module, [SequentialFreezing()], tmp_path, epochs=2, logger=logger, log_every_n_steps=1)
    frozen = sum(module.get_parameter(name).numel() for name in groups(module)[1])
    assert trainer.callback_metrics["sequential_freezing/group"] == 1.0
    assert trainer.callback_metrics["sequential_freezing/frozen_parameters"] == frozen
    assert trainer.callback_metrics["sequential_freezing/step_seconds"] > 0.0


def test_adaptive_mode_freezes_what_hardly_moves_and_resumes_exactly(tmp_path):
    def callback():
        return SequentialFreezing(mode="adaptive", threshold=0.5, window_steps=2)

    settings = {"settings": {"lr": 0.01}, "noisy": False}
    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, watch = low_rank_classifier(**settings), Watch()
    train(whole, [callback(), watch, every], tmp_path, epochs=3, enable_checkpointing=True)
    assert watch.rows[0][3] == set()
    factors = groups(whole)[0] | groups(whole)[1]
    assert factors <= watch.rows[-1][3]
    assert "net.0.bias" in watch.rows[-1][3], "and the modules of the prefix as a whole"
    for _, _, moved, resting in watch.rows:
        assert not moved & resting
    resumed = low_rank_classifier(**settings)
    train(resumed, [callback()], tmp_path, epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_compiled_model_sees_no_more_patterns_than_phases(tmp_path):
    class Counted(Classifier):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.graphs = []
            self.hidden = [self.net]

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.run(batch[0]), batch[1])

    module = low_rank_classifier(Counted, noisy=False)
    torch.compiler.reset()

    def backend(graph, inputs):
        module.graphs.append(graph)
        return graph

    module.run = torch.compile(module.net, backend=backend)
    train(module, [SequentialFreezing()], tmp_path, epochs=6)
    # two phases, and the sanity check runs eagerly
    assert 1 <= len(module.graphs) <= 3
    del module.run


@pytest.mark.parametrize("when", ["setup", 1])
def test_steps_aside_where_the_model_stays_dense(when, tmp_path, caplog):
    module = Classifier()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(module, [RankQuantization(when=when), SequentialFreezing()], tmp_path)
    assert "SequentialFreezing: steps aside: RankQuantization left the model dense." in caplog.text
    assert caplog.text.count("steps aside") == 1


def test_wrong_order_is_corrected_and_said(tmp_path, caplog):
    ranks = RankQuantization(ratio=2.0, method="fixed", when="setup", on_loss="keep")
    module, freezing, watch = Classifier(), SequentialFreezing(), Watch()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        trainer = train(module, [freezing, ranks, watch], tmp_path)
    assert [type(c).__name__ for c in trainer.callbacks[:2]] == ["RankQuantization", "SequentialFreezing"]
    assert "callback order corrected to RankQuantization, SequentialFreezing" in caplog.text
    assert all(resting == groups(module)[epoch] for epoch, _, _, resting in watch.rows)


def test_callback_is_copyable_and_picklable(tmp_path):
    callback = SequentialFreezing()
    train(low_rank_classifier(), [callback], tmp_path, epochs=1)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        module, watch = low_rank_classifier(), Watch()
        train(module, [twin, watch], tmp_path, epochs=1)
        assert watch.rows[0][3] == groups(module)[0]


def test_lbfgs_is_refused(tmp_path):
    module = low_rank_classifier(optimizer="LBFGS", settings={"lr": 0.1})
    with pytest.raises(MisconfigurationException, match="L-BFGS"):
        train(module, [SequentialFreezing()], tmp_path)


@pytest.mark.parametrize("settings", [{}, {"period_steps": 2}])
def test_final_phase_needs_a_known_end(settings, tmp_path):
    with pytest.raises(MisconfigurationException, match="the end of training, which is unknown"):
        train(low_rank_classifier(), [SequentialFreezing(final_trainable=1, **settings)], tmp_path, epochs=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sometimes"}, "`mode` must be"),
        ({"period_epochs": 1, "period_steps": 1}, "one of `period_epochs` and `period_steps`"),
        ({"period_epochs": 0}, "`period_epochs` must be >= 1"),
        ({"weights": (1.0,)}, "`weights` must be 2"),
        ({"threshold": 0.0}, "`threshold` must be > 0"),
        ({"window_steps": 0}, "`window_steps` must be >= 1"),
    ],
)
def test_constructor_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        SequentialFreezing(**settings)


def test_defaults_are_those_of_the_configuration_file():
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        config = compose(overrides=["+callbacks=[sequential_freezing]"])
    assert instantiate(config.callbacks.sequential_freezing).schedule == SequentialFreezing().schedule
