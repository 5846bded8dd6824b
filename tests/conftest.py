"""Settings of every test: one thread a process, no network, quiet Lightning."""

import importlib.util
import logging
import multiprocessing.forkserver
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# the engine for clusters is an extra
collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["*/test_ray_*.py"]

# Programs started in the background of a script ignore Ctrl-C, and so would everything they start; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "pytorch_lightning"):  # what accelerators decide, as `caplog` collects it
        logging.getLogger(name).propagate = True
        logging.getLogger(f"{name}.lightning_accel").setLevel(logging.INFO)


# What worker processes of tests import. A process has one fork server, which is started by whichever test comes first.
WORKERS_IMPORT = [
    "lightning_accel.callbacks.projection.l1inf_projection",
    "lightning_accel.callbacks.projection.multilevel_projection",
    "lightning_accel.callbacks.rank_quantization.callback",
    "lightning_accel.callbacks.recurrent.intra_stream_scheduling",
    "lightning_accel.callbacks.sequential_freezing.callback",
    "lightning_accel.strategies.for_lightning",
    "lightning_accel.strategies.for_pytorch_lightning",
    "lightning_accel.strategies.worker_process.session",
    "lightning_accel.zoo.data.digits",
    "lightning_accel.zoo.models.cnn",
    "pytest",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


@pytest.fixture(autouse=True, scope="session")
def _one_fork_server_for_all():
    """Let the fork server import this, too: the workers of a test that did not start it would do it, each by itself."""
    server = multiprocessing.forkserver
    plain = server.set_forkserver_preload
    plain(WORKERS_IMPORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "set_forkserver_preload", lambda names: plain([*names, *WORKERS_IMPORT]))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Run every test in a folder of its own, so that nothing lands in the checkout."""
    monkeypatch.chdir(tmp_path)


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a device where there is none; `-m gpu` then ends with "no tests ran", which is no pass."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
