"""The words behind a command: overrides, Hydra's flags, and what people type in their place."""

import difflib
import json
import os
from collections.abc import Sequence

OWN_COMMAND_VARIABLE = "LIGHTNING_ACCEL_RUN_COMMAND"  # what `run` starts; kept out of configurations, which are saved
# Flags of Hydra's own parser; those of the second tuple take a value.
_FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc"),
)
FLAGS_WITH_VALUE = (
    *("--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--info", "--experimental-rerun"),
    *("-c", "-p", "-cp", "-cn", "-cd", "-i"),
)
# What other programs call it, without dashes and underscores.
_KEYS = {
    "epochs": "trainer.max_epochs",
    "maxepochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "maxsteps": "trainer.max_steps",
    "accelerator": "trainer.accelerator",
    "device": "trainer.accelerator",
    "devices": "trainer.devices",
    "gpus": "trainer.devices",
    "workers": "trainer.devices",
    "precision": "trainer.precision",
    "lr": "model.lr",
    "learningrate": "model.lr",
    "batchsize": "data.batch_size",
    "seed": "seed",
    "model": "model",
    "data": "data",
    "dataset": "data",
    "callbacks": "callbacks",
    "strategy": "strategy",
    "experiment": "experiment",
    "out": "hydra.run.dir",
    "output": "hydra.run.dir",
    "outputdir": "hydra.run.dir",
    "ckpt": "ckpt_path",
    "ckptpath": "ckpt_path",
    "checkpoint": "ckpt_path",
    "resume": "ckpt_path",
    "ratio": "callbacks.rank_quantization.ratio",
    "sparsity": "callbacks.l1inf_projection.target_sparsity",
    "pairs": "compare.pairs",
}


class NotAnOverrideError(Exception):
    """A flag that Hydra does not have; the message says which override to write."""


def hydra_overrides(name: str, words: Sequence[str]) -> list[str]:
    """Turn the words behind a command into overrides and flags of Hydra.

    ``compare --aa`` is ``compare.aa=true``, ``bench low_rank`` is ``suite=low_rank``, ``evidence DIR`` is
    ``folders=[DIR]``, ``export model=module.Class`` is a class of the user's, and the user's own command of ``run``
    goes into the environment, untouched by Hydra's grammar.

    Raises:
        NotAnOverrideError: If a flag is none of Hydra's.
    """
    words = list(words)
    if name == "compare":
        words = ["compare.aa=true" if word == "--aa" else word for word in words]
    if name == "bench" and words and not words[0].startswith("-") and "=" not in words[0]:
        words[0] = f"suite={words[0]}"
    if name == "evidence":
        folders = [word for word in words if "=" not in word and not word.startswith("-")]
        quoted = ",".join("'" + folder.replace("'", "\\'") + "'" for folder in folders)
        words = [word for word in words if word not in folders] + ([f"folders=[{quoted}]"] if folders else [])
    if name == "run":
        words, command = _own_command(words)
        if command:
            os.environ[OWN_COMMAND_VARIABLE] = json.dumps(command)
    if name == "export":
        words = _own_classes(words)
    _refuse_unknown_flags(name, words)
    return ["--help" if word == "-h" else word for word in words]


def _own_classes(words: Sequence[str]) -> list[str]:
    """Let ``model=module.Class`` and ``model._target_=module.Class`` stand alone, without an option of the package."""
    words = list(words)
    for group in ("model", "data"):
        named = [word.partition("=")[2] for word in words if word.startswith(f"{group}=") and "." in word]
        chosen = any(word.startswith(f"{group}=") for word in words)
        if not named and (chosen or not any(word.startswith(f"{group}._target_=") for word in words)):
            continue
        rest = [word for word in words if not word.startswith(f"{group}=")]
        words = [f"~{group}", *(f"+{group}._target_={name}" for name in named[-1:])]
        words += [f"+{word}" if word.startswith(f"{group}.") else word for word in rest]
        if group == "model" and not any(word.lstrip("+~").startswith("data") for word in words):
            words.append("~data")
    return words


def _own_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Part overrides from the user's command: at ``--``, or else at the first word that can be no override."""
    if "--" in words:
        cut = words.index("--")
        return words[:cut], words[cut + 1 :]
    skip = False
    for place, word in enumerate(words):
        if skip or word.startswith(("-", "~", "+")) or "=" in word:
            skip = word in FLAGS_WITH_VALUE and not skip
            continue
        return words[:place], words[place:]
    return words, []


def _refuse_unknown_flags(name: str, words: Sequence[str]) -> None:
    rest = iter(range(len(words)))
    for place in rest:
        word = words[place]
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag in _FLAGS or _is_number(flag):
            continue
        if flag in FLAGS_WITH_VALUE:
            if not equals:
                next(rest, None)
            continue
        follows = words[place + 1] if place + 1 < len(words) and not equals else ""
        value = value or ("" if follows.startswith("-") or "=" in follows else follows) or "VALUE"
        known = flag.lstrip("-").replace("-", "").replace("_", "").lower()
        close = difflib.get_close_matches(known, _KEYS, n=1, cutoff=0.8)
        key = _KEYS[close[0]] if close else flag.lstrip("-").replace("-", "_")
        hint = "" if close else f" (lightning-accel {name} --help lists the keys)"
        raise NotAnOverrideError(f"`{flag}` is no flag; options are overrides: write {key}={value}{hint}.")


def _is_number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()
