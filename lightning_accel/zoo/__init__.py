"""Small reference LightningModules and DataModules; they need no download and load on first use (PEP 562).

They are ordinary Lightning code: nothing else in the package treats them specially. Every batch is a tuple
``(input, target)``; classifiers log ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy``.
"""

from importlib import import_module

_HOMES = {
    "AddingProblem": "long_memory",
    "BreastCancer": "tabular",
    "CNN": "cnn",
    "CharLM": "char_lm",
    "Classification": "tabular",
    "CopyTask": "long_memory",
    "Digits": "digits",
    "GAN": "gan",
    "GraphRegressor": "graph_regressor",
    "MLP": "mlp",
    "RecurrentRegressor": "recurrent_regressor",
    "ResNet18": "resnet",
    "SupervisedAutoencoder": "autoencoder",
    "Topics": "topics",
    "ViT": "vit",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
