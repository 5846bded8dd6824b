"""One way to compose and instantiate, the same with Hydra 1.3 and 1.4."""

import contextlib
import hashlib
import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_accel.cli.errors import UsageError, annotations, defined_name, refused

_INTEGERS = (int, bool, type(None))
_NUMBERS = (*_INTEGERS, float)
CONFIG_PATH = "pkg://lightning_accel.conf"
# 1.4 deprecates `version_base` and asks which targets code may be built from; 1.3 knows no such question.
_HYDRA_1_3 = tuple(int(part) for part in re.findall(r"\d+", hydra.__version__)[:2]) < (1, 4)


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:8]


# The same words give the same digest, so that a search is found again by the command that began it.
_register = OmegaConf.register_new_resolver if _HYDRA_1_3 else OmegaConf.register_resolver
_register("accel_digest", _digest, replace=True)  # type: ignore[call-arg]  # 2.3's other function has no such argument


def hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorate ``task`` with ``hydra.main`` for a configuration of this package, whatever Hydra's version."""
    if _HYDRA_1_3:
        return hydra.main(config_path=CONFIG_PATH, config_name=config_name, version_base="1.3")(task)
    return hydra.main(config_path=CONFIG_PATH, config_name=config_name)(task)


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``conf/<config_name>.yaml`` with overrides inside a running program, as the tests and notebooks do.

    The program may be a Hydra application itself, such as a started command.

    Values that only a started command has, such as ``paths.output_dir``, must be overridden to be read.
    """
    with _package_configurations():
        return hydra.compose(config_name, overrides=list(overrides))


def help_of(config_name: str, overrides: Sequence[str]) -> str:
    """Return what ``--help`` of a command shows: Hydra's own text, in a third of its time.

    Hydra asks its configurations for every group, and copies all of them before each question.
    """
    with _package_configurations():
        cfg = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
        groups = dict(_groups(""))
    of_app = [name for name in cfg if name != "hydra"]
    listed = "".join(f"{group}: {', '.join(sorted(options))}\n" for group, options in sorted(groups.items()))
    return string.Template(cfg.hydra.help.template).safe_substitute(
        APP_CONFIG_GROUPS=listed, CONFIG=OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, of_app))
    )


@contextlib.contextmanager
def _package_configurations() -> Iterator[None]:
    """Let Hydra compose from this package inside, whatever application is running, and put that back."""
    version = {"version_base": "1.3"} if _HYDRA_1_3 else {}
    application = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("lightning_accel.conf", **version):
            yield
    finally:
        if application is not None:
            GlobalHydra.instance().clear()
            GlobalHydra.instance().initialize(application)


def _groups(parent: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the groups below one, at any depth, with the options that all sources of configurations have for each."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    sources = [source for source in sources if source.provider != "hydra" and source.is_group(parent)]
    for name in sorted({name for source in sources for name in source.list(parent, ObjectType.GROUP)}):
        group = f"{parent}/{name}" if parent else name
        if group == "hydra":
            continue
        having = [source for source in sources if source.is_group(group)]
        options = {option for source in having for option in source.list(group, ObjectType.CONFIG)}
        if options:
            yield group, options
        yield from _groups(group)


def instantiate(node: DictConfig, *, name: str, **given: object) -> Any:
    """Build the object that ``node._target_`` names, with plain dicts and lists as arguments.

    Args:
        node: The configuration with its ``_target_``.
        name: Where it stands, e.g. ``"callbacks.rank_quantization"``; errors name it.
        given: Arguments that no configuration can hold, e.g. the callbacks of a Trainer.

    Raises:
        UsageError: If the class can not be found, annotates a number and is given a word, or an integer and is given a
            fraction, or refuses its arguments by ``ValueError``, ``TypeError`` or Lightning's
            ``MisconfigurationException``. Other errors of a constructor come out as they are.
    """
    _refuse_words(node, name)
    # The user composed these targets and no others, so these and no others are trusted.
    allowed = {} if _HYDRA_1_3 else {"_execution_whitelist_": _names(node)}
    try:
        return hydra_instantiate(node, _convert_="all", **allowed, **given)
    except Exception as error:  # 1.3 wraps what a constructor raises, 1.4 does not
        failure = refused(error, node, name=name)
        if failure is error:
            raise
        raise failure from error.__cause__


def _names(node: DictConfig) -> list[str]:
    """Return the targets of a configuration, under the names they are asked for and those they were defined by."""
    asked = set(targets(OmegaConf.to_container(node, resolve=True)))
    return sorted(asked | {defined_name(target) for target in asked})


def targets(plain: object) -> Iterator[str]:
    """Yield every ``_target_`` in plain dicts and lists, at any depth."""
    if isinstance(plain, dict):
        if isinstance(plain.get("_target_"), str):
            yield plain["_target_"]
        plain = list(plain.values())
    if isinstance(plain, list):
        for item in plain:
            yield from targets(item)


def _refuse_words(node: DictConfig, name: str) -> None:
    """Refuse a word where the target's annotation takes numbers only, and a fraction where it takes integers only.

    Few constructors look, and fail far later.
    """
    for key, (annotation, kinds) in annotations(str(node.get("_target_"))).items():
        value = node.get(key)
        is_word = isinstance(value, str) and all(kind in _NUMBERS for kind in kinds)
        is_fraction = isinstance(value, float) and math.isfinite(value) and not value.is_integer()
        if is_word or (is_fraction and all(kind in _INTEGERS for kind in kinds)):
            raise UsageError(f"`{name}.{key}` must be {annotation}, got {value!r}.")
