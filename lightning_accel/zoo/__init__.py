"""Small reference LightningModules and DataModules; they need no download and load on first use (PEP 562).

They are ordinary Lightning code: nothing else in the package treats them specially. Every batch is a tuple
``(input, target)``; classifiers log ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy``.
"""

from importlib import import_module

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
