"""Small reference LightningModules and DataModules; they need no download and load on first use (PEP 562).

They are ordinary Lightning code: nothing else in the package treats them specially. Every batch is a tuple
``(input, target)``; classifiers log ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time names load on first use
    from lightning_accel.zoo.data.digits import Digits as Digits
    from lightning_accel.zoo.data.long_memory import AddingProblem as AddingProblem
    from lightning_accel.zoo.data.long_memory import CopyTask as CopyTask
    from lightning_accel.zoo.data.tabular import BreastCancer as BreastCancer
    from lightning_accel.zoo.data.tabular import Classification as Classification
    from lightning_accel.zoo.data.topics import Topics as Topics
    from lightning_accel.zoo.models.autoencoder import SupervisedAutoencoder as SupervisedAutoencoder
    from lightning_accel.zoo.models.char_lm import CharLM as CharLM
    from lightning_accel.zoo.models.cnn import CNN as CNN
    from lightning_accel.zoo.models.gan import GAN as GAN
    from lightning_accel.zoo.models.graph_regressor import GraphRegressor as GraphRegressor
    from lightning_accel.zoo.models.mlp import MLP as MLP
    from lightning_accel.zoo.models.recurrent_regressor import RecurrentRegressor as RecurrentRegressor
    from lightning_accel.zoo.models.resnet import ResNet18 as ResNet18
    from lightning_accel.zoo.models.vit import ViT as ViT

_HOMES = {
    "AddingProblem": "data.long_memory",
    "BreastCancer": "data.tabular",
    "CNN": "models.cnn",
    "CharLM": "models.char_lm",
    "Classification": "data.tabular",
    "CopyTask": "data.long_memory",
    "Digits": "data.digits",
    "GAN": "models.gan",
    "GraphRegressor": "models.graph_regressor",
    "MLP": "models.mlp",
    "RecurrentRegressor": "models.recurrent_regressor",
    "ResNet18": "models.resnet",
    "SupervisedAutoencoder": "models.autoencoder",
    "Topics": "data.topics",
    "ViT": "models.vit",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
