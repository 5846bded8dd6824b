"""What a run leaves in its folder: its configuration without secrets or machine paths, and its numbers."""

import json
import math
import re
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

_SECRET_KEY = re.compile(
    r"(^|[_.])(api_?key|access_?key|private_?key|token|secret|passw(or)?d|passphrase|credentials?)$", re.IGNORECASE
)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "***"


def cleaned(value: object, key: str = "") -> object:
    """Return a copy of plain data without secrets and without the folders of this machine.

    Values under keys that name a secret and logins in addresses become ``***``; the current folder becomes ``.``, the
    home folder ``~``.
    """
    if _SECRET_KEY.search(key) and value is not None:
        return HIDDEN
    if isinstance(value, dict):
        return {k: cleaned(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(v) for v in value]
    if isinstance(value, str):
        text = _URL_LOGIN.sub(f"{HIDDEN}@", value)
        for folder, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
            text = re.sub(rf"{re.escape(folder)}(?=/|$)", short, text) if folder != "/" else text
        return text
    return value


def cleaned_override(override: str) -> str:
    """Return an override as it may be shown: its value cleaned like that of its key."""
    key, equals, value = override.partition("=")
    return f"{key}{equals}{cleaned(value, key)}" if equals else override


def save_configuration(cfg: DictConfig, folder: Path) -> None:
    """Write ``config.yaml``, cleaned, with its interpolations unresolved, so that no secret is looked up."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = cast(dict[str, object], cleaned(OmegaConf.to_container(cfg, resolve=False)))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), encoding="utf-8")


def save_metrics(metrics: dict[str, float], overrides: list[str], folder: Path) -> None:
    """Write ``metrics.json`` with the overrides that made the run; a number that is not finite becomes null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    record = {"overrides": [cleaned_override(o) for o in overrides], "metrics": finite}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_failure(reason: str, overrides: list[str], folder: Path) -> None:
    """Write ``failed.json``: why a job of a sweep failed, for the table at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)  # of a job before this one in the same folder
    first = (reason.splitlines() or ["it did not end"])[0]
    record = {"overrides": [cleaned_override(o) for o in overrides], "reason": str(cleaned(first))}
    (folder / "failed.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
