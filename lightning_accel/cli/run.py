"""``lightning-accel run``: start the user's own command so that every Trainer in it gets the accelerators."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.factory import CALLBACKS_VARIABLE, TAKEN_VARIABLE
from lightning_accel.cli.results import save_configuration
from lightning_accel.cli.words import OWN_COMMAND_VARIABLE

_FORWARDED = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)]


def run(cfg: DictConfig) -> None:
    """Run the user's command with ``cfg.callbacks`` composed in, and exit as it does.

    Raises:
        UsageError: If there is no command, it can not be started, or no callback is chosen or can be built.
        SystemExit: With the command's exit code where that is not 0; 128 + n if signal n ended it; with 1 if no Trainer
            took the callbacks and ``cfg.run.require`` holds.
    """
    command = json.loads(os.environ.get(OWN_COMMAND_VARIABLE, "[]"))
    if not command:
        raise UsageError("There is no command. Put it last: lightning-accel run callbacks=[...] -- python train.py")
    if not cfg.get("callbacks"):
        raise UsageError("No callback is chosen: add callbacks=[...]; lightning-accel run --help lists them.")
    _check(cfg)
    folder = Path(cfg.paths.output_dir)
    save_configuration(cfg, folder)
    taken = folder / "trainers.txt"
    taken.unlink(missing_ok=True)  # of a run before this one
    environment = os.environ | {
        CALLBACKS_VARIABLE: json.dumps(OmegaConf.to_container(cfg.callbacks, resolve=True)),
        TAKEN_VARIABLE: str(taken.resolve()),
    }
    del environment[OWN_COMMAND_VARIABLE]
    try:
        child = subprocess.Popen(command, env=environment)
    except FileNotFoundError:
        raise UsageError(f"`{command[0]}` was not found: is it installed, is the environment active?") from None
    except OSError as error:  # a script that is no program, say
        raise UsageError(
            f"`{command[0]}` can not be started ({error.strerror}). Name the program that runs it: -- python FILE"
        ) from None
    with _forwarded_signals(child):
        code = child.wait()
    if not taken.exists():
        message = "no Trainer took the callbacks: the command made none, or its Python does not have lightning-accel."
        if cfg.run.require if cfg.run.require is not None else os.environ.get("CI", "") not in ("", "0", "false"):
            print(f"lightning-accel run: {message} run.require=false lets that pass.", file=sys.stderr)
            code = code or 1
        else:
            print(f"lightning-accel run: {message} run.require=true makes it an error.", file=sys.stderr)
    if code != 0:
        raise SystemExit(code if code > 0 else 128 - code)


def _check(cfg: DictConfig) -> None:
    """Build the callbacks once here, where a mistake is one line and not the end of the user's program."""
    from lightning_accel.cli.fit import build_callbacks

    build_callbacks(cfg, "callbacks")


@contextlib.contextmanager
def _forwarded_signals(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Pass signals on. Ctrl-C of a terminal has already reached the child, which is in the same process group."""

    def forward(number: int, _: object) -> None:
        if number != signal.SIGINT or not _in_foreground():
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in [signal.SIGINT, *_FORWARDED]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # no terminal
        return False
