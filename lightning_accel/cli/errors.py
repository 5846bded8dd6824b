"""From an exception to one message that says what is wrong and what to do, and an exit code."""

import difflib
import errno
import inspect
import itertools
import pkgutil
import traceback
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import get_args, get_type_hints

from hydra import errors as hydra_errors
from omegaconf import DictConfig, OmegaConf
from omegaconf import errors as omegaconf_errors

FAILED, NOT_UNDERSTOOD, INTERRUPTED = 1, 2, 130
_EXTRAS = {"optuna": "optuna", "matplotlib": "examples", "sklearn": "examples", "onnx": "onnx", "ray": "ray"}
_FEW = 12  # so many names still make a readable list


class UsageError(Exception):
    """The user can mend this on the command line. The message says what is wrong and what to do."""


def explain(error: BaseException, overrides: Iterable[str] = ()) -> tuple[str, int]:
    """Return the message for an exception that ended a command, and the exit code.

    Args:
        error: What was raised.
        overrides: What the user typed; the one that is to blame is named where Hydra does not say which.
    """
    if isinstance(error, UsageError):
        return str(error), NOT_UNDERSTOOD
    overrides = list(overrides)
    if isinstance(error, hydra_errors.MissingConfigException):
        return _missing_option(error, overrides), NOT_UNDERSTOOD
    if isinstance(error, hydra_errors.OverrideParseException):
        quoting = "Quote it for the shell: 'key=[a,b]', 'key=\"some text\"'"
        return f"`{error.override}` can not be read: {_first_line(error)}. {quoting}.", NOT_UNDERSTOOD
    if isinstance(error, hydra_errors.CompactHydraException):
        return _not_composed(error, overrides), NOT_UNDERSTOOD
    if isinstance(error, omegaconf_errors.MissingMandatoryValue):
        return f"`{error.full_key}` is needed and has no default: add {error.full_key}=VALUE.", NOT_UNDERSTOOD
    if isinstance(error, omegaconf_errors.OmegaConfBaseException):
        return f"{_first_line(error)} (at `{error.full_key}`)", NOT_UNDERSTOOD
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error), FAILED
    return f"{type(error).__name__}: {str(error).strip() or _failing_line(error)}{_where(error)}", FAILED


def refused(error: Exception, node: DictConfig, *, name: str) -> BaseException:
    """Return what to raise when an object could not be built: a `UsageError`, or the constructor's own failure."""
    called = not isinstance(error, hydra_errors.InstantiationException) or "Error in call to target" in str(error)
    cause = error.__cause__ if isinstance(error, hydra_errors.InstantiationException) else error
    deepest = cause
    while deepest is not None and deepest.__cause__ is not None:
        deepest = deepest.__cause__
    where = _full_key(error, name)
    inner = OmegaConf.select(node, where[len(name) + 1 :]) if where.startswith(f"{name}.") else node
    target = (inner if isinstance(inner, DictConfig) else node).get("_target_")
    if cause is None or not called:
        return UsageError(
            f"`{where}._target_` names {target}, which can not be imported: {_first_line(deepest or error)}"
        )
    if isinstance(cause, ImportError):
        return UsageError(f"`{where}` ({target}) needs something that is not installed: {cause}{_extra(cause)}")
    if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):
        key = str(cause).rsplit("'", 2)[-2]
        return UsageError(
            f"`{where}.{key}`: {target} takes no `{key}`. {did_you_mean(key, parameters(str(target)))}".rstrip()
        )
    if isinstance(cause, TypeError | ValueError) or type(cause).__name__ == "MisconfigurationException":
        return UsageError(f"`{where}` ({target}): {cause}")
    return cause


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Name the closest of ``known`` if there are close ones, and all of them if they are few or none is close."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(f'`{c}`' for c in close)}? " if close else ""
    listed = known if len(known) <= _FEW or not close else []
    return (hint + (f"There are: {', '.join(listed)}." if listed else "")).strip()


def parameters(target: str) -> list[str]:
    """Return the names of the arguments that a ``_target_`` takes, or none if it can not be read."""
    try:
        signature = inspect.signature(pkgutil.resolve_name(target))
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]


def defined_name(target: str) -> str:
    """Return module and qualified name of what a ``_target_`` names, or ``target`` itself if it can not be found."""
    try:
        made = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return target
    return f"{getattr(made, '__module__', None)}.{getattr(made, '__qualname__', target)}"


def annotations(target: str) -> dict[str, tuple[str, tuple[object, ...]]]:
    """Return, for each argument of a ``_target_``, its annotation as text and the types in it."""
    try:
        made = pkgutil.resolve_name(target)
        hints = get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except Exception:  # other people's annotations; without them nothing is checked
        return {}
    readable = {name: inspect.formatannotation(hint).replace("typing.", "") for name, hint in hints.items()}
    return {name: (readable[name], get_args(hint) or (hint,)) for name, hint in hints.items() if name != "return"}


def _missing_option(error: hydra_errors.MissingConfigException, overrides: list[str]) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if group == "hydra/sweeper" and option in _EXTRAS:
        return f"`{option}` is not installed: pip install 'lightning-accel[{_EXTRAS[option]}]'."
    if not group:
        return str(error)
    known = error.options or options(group, overrides)
    return f"`{option}` is no option of the group `{group}`. {did_you_mean(option, known) or 'It has none.'}"


def _not_composed(error: hydra_errors.CompactHydraException, overrides: list[str]) -> str:
    cause = error.__cause__
    if isinstance(cause, omegaconf_errors.ConfigKeyError | omegaconf_errors.ConfigAttributeError):
        parent, key = cause.parent_node, str(cause.key)
        return _unknown_key(parent, key, cause.full_key or key, overrides)
    text = str(error).strip()
    if isinstance(cause, omegaconf_errors.OmegaConfBaseException):
        text += f": {_first_line(cause)}"
    return text


def _unknown_key(parent: object, key: str, full_key: str, overrides: list[str]) -> str:
    typed = next((o for o in overrides if o.lstrip("+~").startswith(full_key)), f"{full_key}=VALUE")
    wanted = typed.lstrip("+~").partition("=")[0].split(".")
    if wanted[0] in ("callbacks", "monitoring", "logger") and wanted[1:] and full_key.count(".") < 2:
        known = options(wanted[0], overrides)
        if wanted[1] not in known:
            return f"`{wanted[1]}` is no option of the group `{wanted[0]}`. {did_you_mean(wanted[1], known)}"
        chosen = [str(k) for k in parent] if isinstance(parent, DictConfig) and "." in full_key else []
        return (
            f"`{wanted[0]}.{wanted[1]}` is not in use. Choose it first: {wanted[0]}=[{','.join([*chosen, wanted[1]])}]"
        )
    keys = [str(k) for k in parent if k not in ("_target_", "hydra")] if isinstance(parent, DictConfig) else []
    target = parent.get("_target_") if isinstance(parent, DictConfig) else None
    taken = parameters(target) if isinstance(target, str) else []
    if key in taken:
        return f"`{full_key}` is not set in the configuration, but {target} takes it: add it with +{typed}"
    if "." not in full_key:
        keys += [entry.name for entry in files("lightning_accel.conf").iterdir() if _is_group(entry)]
    parent_key = full_key.rpartition(".")[0]
    place = f"`{parent_key}` has" if parent_key else "there is"
    return f"`{full_key}` can not be set: {place} no `{key}`. {did_you_mean(key, [*keys, *taken])}".rstrip()


def options(group: str, words: Sequence[str] = ()) -> list[str]:
    """Return the options of a group, those in folders given by ``--config-dir`` included."""
    folders = [files("lightning_accel.conf") / group]
    for flag, value in itertools.pairwise(words):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value) / group)
    found = [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    return sorted({name[: -len(".yaml")] for name in found if name.endswith(".yaml")})


def _is_group(entry: object) -> bool:
    return bool(entry.is_dir()) and not entry.name.startswith("_")  # type: ignore[attr-defined]


def _full_key(error: Exception, name: str) -> str:
    for line in [*str(error).splitlines(), *getattr(error, "__notes__", [])]:
        if line.startswith("full_key: "):
            return line.removeprefix("full_key: ").strip()
    return name


def _extra(cause: ImportError) -> str:
    extra = _EXTRAS.get((cause.name or "").partition(".")[0])
    return f": pip install 'lightning-accel[{extra}]'" if extra else ""


def _system(error: OSError) -> str:
    what = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return f"{what}. Results go under `paths.root_dir`: choose a folder you may write, paths.root_dir=FOLDER."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}. Free some space, or write elsewhere: paths.root_dir=FOLDER."
    return what


def _where(error: BaseException) -> str:
    """Name the last line that is not inside a library, by file name only."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return f" (in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _failing_line(error: BaseException) -> str:
    """Return the line of code that failed, for an error that says nothing, such as an assertion of a library."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"`{frames[-1].line}`" if frames and frames[-1].line else "no message"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
