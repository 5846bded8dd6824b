"""Run the jobs of a sweep in other processes: of this machine by joblib, of any machine by Ray.

A job whose process dies is a failed job, and the others' results are kept.
"""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lightning_accel.async_sgd.ray_engine.cluster import LOOPBACK, closed_to_others, termination_kept
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.results import save_failure

_log = logging.getLogger(__name__)


class LostProcessError(Exception):
    """The process of a job ended before the job did."""


@dataclass
class Job:
    """One job, with all that another process needs to run it as this one would.

    Attributes:
        hydra_context: Hydra's.
        config: Composed for this job.
        task_function: What the job calls.
        singletons: Hydra's state that belongs to a process.
        folder: The current one, which relative paths of the configuration start from.
        search_path: Where Python finds modules, the user's included.
    """

    hydra_context: HydraContext
    config: DictConfig
    task_function: TaskFunction
    singletons: Any
    folder: str
    search_path: list[str]


def prepare(
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    overrides: Sequence[Sequence[str]],
    first: int,
) -> list[Job]:
    """Compose the configuration of every job.

    Args:
        hydra_context: Hydra's.
        config: That of the sweep.
        task_function: What a job calls.
        overrides: Those of each job.
        first: Number of the first job.
    """
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, words in enumerate(overrides, first):
        _log.info("\t#%d : %s", number, " ".join(filter_overrides(list(words))))
        composed = hydra_context.config_loader.load_sweep_config(config, list(words))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        state = Singleton.get_state()
        jobs.append(Job(hydra_context, composed, task_function, state, os.getcwd(), list(sys.path)))
    return jobs


def run(job: Job) -> JobReturn:
    """Run a job in this process, which is another than that of the sweep."""
    os.chdir(job.folder)
    sys.path.extend(folder for folder in job.search_path if folder not in sys.path)
    setup_globals()
    Singleton.set_state(job.singletons)
    HydraConfig.instance().set_config(job.config)
    return run_job(
        hydra_context=job.hydra_context,
        task_function=job.task_function,
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def run_with_joblib(jobs: Sequence[Job], *, n_jobs: int) -> list[JobReturn]:
    """Run jobs in processes of this machine.

    joblib stops all its processes when one dies: the jobs without a result are then run once more, one by one, and the
    one that ends its process again has failed.

    Args:
        jobs: From `prepare`.
        n_jobs: How many run at a time; -1 is as many as there are cores.

    Raises:
        UsageError: If ``n_jobs`` is out of range or joblib is missing.
    """
    if not isinstance(n_jobs, int) or (n_jobs < 1 and n_jobs != -1):
        raise UsageError(f"`hydra.launcher.n_jobs` must be an integer >= 1, or -1 for all cores, got {n_jobs}.")
    try:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError
    except ImportError as error:
        raise UsageError("hydra/launcher=joblib needs joblib: pip install joblib") from error
    returned: dict[int, JobReturn] = {}
    places = range(len(jobs))

    def collect(some: Sequence[int], processes: int) -> None:
        pool = Parallel(n_jobs=processes, backend="loky", return_as="generator_unordered", pre_dispatch="all")
        returned.update(pool(delayed(_run_placed)(place, jobs[place]) for place in some))

    if n_jobs != 1:
        try:
            collect(places, n_jobs)
        except TerminatedWorkerError as error:
            _log.warning("a process died, the jobs without a result run again one by one: %s", _first_line(error))
    for place in places:
        if place not in returned:
            try:
                collect([place], 2)  # if there were to be one process only, joblib would take this one
            except TerminatedWorkerError as error:
                returned[place] = _lost(jobs[place], error)
    return [returned[place] for place in places]


def run_with_ray(
    jobs: Sequence[Job],
    *,
    address: str | None,
    cpus_per_job: float,
    gpus_per_job: float,
    init: Mapping[str, Any] | None,
) -> list[JobReturn]:
    """Run jobs on a Ray cluster, whose machines share the current folder and have this package.

    Args:
        jobs: From `prepare`.
        address: Of a running cluster; None is that of ``RAY_ADDRESS``, or starts one on this machine, on loopback and
            with a token of its own, which ends with the command.
        cpus_per_job: Cores that a job waits for, > 0.
        gpus_per_job: GPUs that a job waits for, >= 0; fractions share one.
        init: More arguments of ``ray.init``.

    Raises:
        UsageError: If a number is out of range, Ray is missing, or this machine has not what a job asks for.
    """
    if not cpus_per_job > 0 or gpus_per_job < 0:
        raise UsageError(
            f"`hydra.launcher.cpus_per_job` must be > 0 and `gpus_per_job` >= 0, got {cpus_per_job} and {gpus_per_job}."
        )
    try:
        import ray
    except ImportError as error:
        raise UsageError("hydra/launcher=ray needs Ray: pip install 'lightning-accel[ray]'") from error
    address = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        _connect(address, dict(init or {}))
    if address is None:  # others may grow
        _check_room(ray.nodes(), cpus_per_job, gpus_per_job)
    remote = ray.remote(num_cpus=cpus_per_job, num_gpus=gpus_per_job, max_retries=0)(run)
    waiting = [remote.remote(job) for job in jobs]

    def result_of(job: Job, reference: Any) -> JobReturn:
        try:
            returned: JobReturn = ray.get(reference)
            return returned
        except ray.exceptions.RayError as error:
            return _lost(job, error)

    return [result_of(job, reference) for job, reference in zip(jobs, waiting, strict=True)]


_connection = contextlib.ExitStack()  # for as long as the command runs: a search launches jobs again and again
atexit.register(_connection.close)


def _connect(address: str | None, arguments: dict[str, Any]) -> None:
    import ray

    if address is None:
        _connection.enter_context(closed_to_others())
        arguments = {"include_dashboard": False, "_node_ip_address": LOOPBACK, **arguments, "address": "local"}
    else:
        _connection.enter_context(termination_kept())
        arguments = {**arguments, "address": address}
    ray.init(**arguments)
    _connection.callback(ray.shutdown)


def disconnect() -> None:
    """End the cluster of this machine, or leave another."""
    _connection.close()


def _check_room(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> None:
    """Refuse what Ray would wait for in vain on this machine alone."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    (held,) = machines
    if held.get("CPU", 0) < cpus or held.get("GPU", 0) < gpus:
        raise UsageError(
            f"a job asks for {cpus:g} cores and {gpus:g} GPUs, this machine has {held.get('CPU', 0):g} and "
            f"{held.get('GPU', 0):g}: lower hydra.launcher.cpus_per_job or hydra.launcher.gpus_per_job, or name a "
            "cluster by hydra.launcher.address."
        )


def _run_placed(place: int, job: Job) -> tuple[int, JobReturn]:
    return place, run(job)


def _lost(job: Job, error: Exception) -> JobReturn:
    """Report a job whose process is gone: in its folder, for the table at the end, and to the sweep."""
    hydra, reason = job.config.hydra, f"its process ended before it did: {_first_line(error)}"
    save_failure(reason, list(hydra.overrides.task), Path(str(hydra.sweep.dir)) / str(hydra.sweep.subdir))
    returned = JobReturn(overrides=list(hydra.overrides.task), status=JobStatus.FAILED)
    returned.return_value = LostProcessError(reason)
    return returned


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
