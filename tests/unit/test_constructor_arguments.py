"""Every argument of every accelerator's constructor refuses values of the wrong kind by name, from Python and YAML."""

import inspect
import math
from typing import get_args, get_type_hints

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_accel import (
    AsyncSGDStrategy,
    IntraStreamScheduling,
    L1InfProjection,
    MultilevelProjection,
    RankQuantization,
    SequentialFreezing,
    StatefulStreams,
)

NEEDED = {L1InfProjection: {"radius": 1.0}, MultilevelProjection: {"radius": 1.0}}
OF_LIGHTNING = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
ARGUMENTS = [
    pytest.param(kind, name, id=f"{kind.__name__}-{name}")
    for kind in (
        AsyncSGDStrategy,
        IntraStreamScheduling,
        L1InfProjection,
        MultilevelProjection,
        RankQuantization,
        SequentialFreezing,
        StatefulStreams,
    )
    for name in inspect.signature(kind).parameters
    if name not in OF_LIGHTNING
]


class Thing:
    """Of no kind that any argument takes."""


def wrong_values(kind, name):
    """Return values that do not fit the argument's annotation; text does not fit where it only allows certain words."""
    hint = get_type_hints(kind.__init__)[name]
    allowed = {hint, *get_args(hint)}
    values = [Thing()]
    if not allowed & {str} and not any("Sequence" in str(part) or "Path" in str(part) for part in allowed):
        values += ["abc", math.nan, ["3"]]
    if bool not in allowed:
        values.append(True)
    if int in allowed and float not in allowed:
        values += [2.5]
    return values


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS)
def test_wrong_kind_is_refused_by_name(kind, name):
    needed = NEEDED.get(kind, {})
    for value in wrong_values(kind, name):
        with pytest.raises((TypeError, ValueError), match=f"`{name}`|`{name}\\["):
            kind(**{**({} if name in ("radius_fraction", "target_sparsity") else needed), name: value})


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS)
def test_wrong_kind_is_refused_by_name_from_yaml(kind, name):
    hint = get_type_hints(kind.__init__)[name]
    allowed = {hint, *get_args(hint)}
    wrong = 3.25 if str in allowed or "Path" in str(hint) or "Sequence" in str(hint) else "abc"
    needed = {} if name in ("radius_fraction", "target_sparsity") else NEEDED.get(kind, {})
    node = OmegaConf.create({"_target_": f"lightning_accel.{kind.__name__}", **needed, name: wrong})
    with pytest.raises(Exception, match=f"`{name}`|`{name}\\["):
        instantiate(node)
