"""RL4CO: an attention model learns tours by reinforcement; its own Trainer is of `lightning.pytorch`."""

import torch
from rl4co.envs import TSPEnv
from rl4co.models import AttentionModel
from rl4co.utils import RL4COTrainer

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "rl4co", "reinforcement learning", "attention model", "tour length"
INSTALL = (("rl4co",),)
NO_STRATEGY = ""
EPOCHS, TOWNS = 3, 12

ENV = TSPEnv(generator_params={"num_loc": TOWNS})
torch.manual_seed(0)
HELD_OUT = ENV.reset(batch_size=[128])


def _model():
    sizes = {"batch_size": 64, "train_data_size": 512, "val_data_size": 64, "test_data_size": 64}
    return AttentionModel(ENV, baseline="exponential", optimizer_kwargs={"lr": 1e-3}, **sizes)


def train(callbacks, *, strategy, devices):
    model = _model()
    settings = trainer_settings(callbacks, strategy, devices)
    trainer = RL4COTrainer(max_epochs=EPOCHS, precision="32-true", logger=False, **settings)
    trainer.fit(model)
    return model, trainer


def module_of(trained):
    return trained[0]


def predict(trained):
    policy = trained[0].policy.eval()
    with torch.no_grad():
        return -policy(HELD_OUT.clone(), ENV, phase="test", decode_type="greedy")["reward"].numpy()


def score(trained):
    return predict(trained).mean()


def reload(trained, folder):
    path = folder / "model.ckpt"
    trained[1].save_checkpoint(path)
    again = _model()
    again.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    return again, trained[1]
