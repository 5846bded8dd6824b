"""Start a command under Hydra and turn whatever happens into an exit code and, at most, one message."""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_accel.cli.compose import help_of, hydra_main
from lightning_accel.cli.errors import INTERRUPTED, explain
from lightning_accel.cli.results import save_failure
from lightning_accel.cli.words import FLAGS_WITH_VALUE

_TRACEBACK_VARIABLE = "HYDRA_FULL_ERROR"
_MULTIRUN = {"-m", "--multirun"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a line that says what was kept."""


class _JobFailed(BaseException):
    """Carries the failure of a single job past Hydra, which would print about it."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(failure)
        self.failure = failure


def launch(name: str, overrides: Sequence[str]) -> int:
    """Compose ``conf/<name>.yaml`` with ``overrides``, run the command, and return the exit code."""
    wants_traceback = os.environ.get(_TRACEBACK_VARIABLE) == "1"
    flags, plain = split_flags(overrides)
    if any(word.startswith("sweep=") and word != "sweep=null" for word in plain) and not _MULTIRUN & set(flags):
        flags.append("--multirun")  # as the group's files say; Hydra 1.4 reads the words before it reads them
    words = [*flags, f"hydra.job.name={name}", *plain]
    job = _Job(name, list(sys.argv))
    try:
        # Hydra prints and exits by itself unless it is told to raise.
        with (
            _set(sys, "argv", [f"lightning-accel {name}", *words]),
            _environment(_TRACEBACK_VARIABLE, "1"),
            warnings.catch_warnings(),
        ):
            # Hydra 1.4 would have us trust the names of all its callbacks before it reads which the user has.
            warnings.filterwarnings("ignore", message=r"(?s).*lightning_accel\.cli\.sweep\.SweepReport")
            try:
                if flags == ["--help"]:
                    print(help_of(name, words[1:]))
                    return 0
                hydra_main(name, job)()
            finally:
                if sweep := sys.modules.get("lightning_accel.cli.sweep"):
                    sweep.report_unfinished()
    except KeyboardInterrupt as error:
        print(str(error) or "Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except (Exception, _JobFailed) as error:
        failure = error.failure if isinstance(error, _JobFailed) else error
        if isinstance(failure, BrokenPipeError):  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if wants_traceback:
            raise failure from None
        message, code = explain(failure, overrides)
        print(f"lightning-accel {name}: {message}", file=sys.stderr)
        if code == 1:
            print(f"{_TRACEBACK_VARIABLE}=1 shows the traceback.", file=sys.stderr)
        return code
    return 0


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part Hydra's flags, with their values, from overrides: its parser does not take them mixed."""
    flags: list[str] = []
    plain: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            plain.append(word)
            continue
        flags.append(word)
        if word in FLAGS_WITH_VALUE:
            flags.extend(value for value in [next(rest, None)] if value is not None)
    return flags, plain


class _Job:
    """What Hydra calls for every job; picklable, for launchers that use other processes."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        self.argv = argv
        self.tracebacks = os.environ.get(_TRACEBACK_VARIABLE)
        self.__module__ = f"lightning_accel.cli.{name}"  # Hydra names the job after it
        self.__name__ = name

    def __call__(self, cfg: DictConfig) -> object:
        # Lightning starts the other processes of a distributed run with `sys.argv`: they must see this command, and
        # inside a sweep this job of it.
        argv = [self.argv[0], self.name, *_job_overrides()]
        traceback = _environment(_TRACEBACK_VARIABLE, self.tracebacks)
        with _set(sys, "argv", argv), traceback, _ranks_forgotten(), _tracking_ended():
            try:
                return self._run(cfg)
            except Exception as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    reason = explain(error, [])[0]
                    save_failure(reason, list(HydraConfig.get().overrides.task), Path(cfg.paths.output_dir))
                    raise  # a sweeper may count failures and go on
                raise _JobFailed(error) from None

    def _run(self, cfg: DictConfig) -> object:
        function = getattr(importlib.import_module(self.__module__), self.name)
        # Lightning prints by itself although Hydra has set up logging: every line would come twice.
        logging.getLogger("lightning").handlers.clear()
        return function(cfg)


@contextlib.contextmanager
def _ranks_forgotten() -> Iterator[None]:
    """Leave the process group that a distributed job made, and its variables: the next job of a sweep makes its own."""
    before = dict(os.environ)
    try:
        yield
    finally:
        distributed = getattr(sys.modules.get("torch"), "distributed", None)
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _tracking_ended() -> Iterator[None]:
    """End a run of Weights & Biases, which Lightning leaves open: the next job of a sweep would write into it."""
    failed = 1
    try:
        yield
        failed = 0
    finally:
        wandb = sys.modules.get("wandb")
        if getattr(wandb, "run", None) is not None:  # a folder `wandb` may have been taken for the package
            sys.modules["wandb"].finish(exit_code=failed)


def _job_overrides() -> list[str]:
    overrides = HydraConfig.get().overrides
    plain = [str(override) for override in overrides.task]
    of_hydra = [str(override) for override in overrides.hydra]
    of_hydra = [override for override in of_hydra if not override.startswith(("hydra.mode=", "hydra/sweeper"))]
    return [*plain, *of_hydra]


@contextlib.contextmanager
def _set(owner: object, attribute: str, value: object) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


@contextlib.contextmanager
def _environment(variable: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(variable)
    _put(variable, value)
    try:
        yield
    finally:
        _put(variable, before)


def _put(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
