"""What Lightning asks for callbacks each time a Trainer is made, in every program of the environment.

`lightning-accel run` puts the callbacks it composed into an environment variable; without it there are none, at the
cost of one look-up. Nothing is imported before it is needed: this file is part of other people's start-up.
"""

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging

CALLBACKS_VARIABLE = "LIGHTNING_ACCEL_CALLBACKS"  # JSON: name to block with `_target_`
TAKEN_VARIABLE = "LIGHTNING_ACCEL_TAKEN"  # file to note in, once a Trainer has got them


def callbacks() -> list[Any]:
    """Build the callbacks that ``lightning-accel run`` composed, less those that the script has itself.

    Raises:
        UsageError: If one can not be built.
    """
    composed = os.environ.get(CALLBACKS_VARIABLE)
    return _build(json.loads(composed)) if composed else []


def _build(nodes: dict[str, dict[str, Any]]) -> list[Any]:
    import logging

    from omegaconf import OmegaConf

    from lightning_accel.cli.compose import instantiate
    from lightning_accel.lightning_private import callbacks_of_new_trainer

    log = logging.getLogger(__name__)
    _let_us_be_heard(logging.getLogger("lightning_accel"))
    present = {_class_name(callback) for callback in callbacks_of_new_trainer()}
    built = []
    for name, node in nodes.items():
        callback = instantiate(OmegaConf.create(node), name=f"callbacks.{name}")
        if _class_name(callback) in present:
            log.warning("`%s` is not added: this Trainer already has its own %s.", name, type(callback).__name__)
        else:
            built.append(callback)
    if os.environ.get(TAKEN_VARIABLE):
        with open(os.environ[TAKEN_VARIABLE], "a", encoding="utf-8") as file:
            file.write(" ".join(nodes) + "\n")
    return built


def _let_us_be_heard(ours: "logging.Logger") -> None:
    """Show what the callbacks report, in a program that may not have set up logging."""
    import logging

    if not ours.hasHandlers():
        ours.addHandler(logging.StreamHandler())
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)


def _class_name(callback: object) -> str:
    """Return the full class name; the two distributions of Lightning have each callback under two names."""
    kind = type(callback)
    return f"{kind.__module__}.{kind.__qualname__}".replace("pytorch_lightning.", "lightning.pytorch.", 1)
