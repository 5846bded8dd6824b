"""PINA: a network solves Poisson's equation (gradients of gradients); its own Trainer is of `lightning.pytorch`."""

import numpy as np
import torch
from pina import Trainer
from pina.model import FeedForward
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver

from lightning_accel import load_from_checkpoint
from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "pina-mathlab", "physics", "feed-forward network of a PDE", "RMSE"
INSTALL = (("pina-mathlab",),)
NO_STRATEGY = ""
EPOCHS = 120

PROBLEM = Poisson2DSquareProblem()
PROBLEM.discretise_domain(n=100, mode="random")
GRID = PROBLEM.spatial_domain.sample(n=400, mode="random")


def _solver():
    network = FeedForward(input_dimensions=2, output_dimensions=1, layers=[64, 64, 64], func=torch.nn.Tanh)
    return PhysicsInformedSingleModelSolver(problem=PROBLEM, model=network)


def train(callbacks, *, strategy, devices):
    solver = _solver()
    settings = trainer_settings(callbacks, strategy, devices)
    trainer = Trainer(solver, max_epochs=EPOCHS, logger=False, enable_checkpointing=False, **settings)
    trainer.train()
    return solver, trainer


def module_of(trained):
    return trained[0]


def predict(trained):
    with torch.no_grad():
        return trained[0](GRID).as_subclass(torch.Tensor).numpy()


def score(trained):
    solution = PROBLEM.solution(GRID).as_subclass(torch.Tensor).numpy()
    return np.sqrt(np.square(predict(trained) - solution).mean())


def reload(trained, folder):
    path = folder / "model.ckpt"
    trained[1].save_checkpoint(path)
    arguments = {"problem": PROBLEM, "model": _solver().model}
    return load_from_checkpoint(type(trained[0]), path, weights_only=False, init_arguments=arguments), trained[1]
