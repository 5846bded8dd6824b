"""Settings of every test: one thread a process, no network, quiet Lightning."""

import importlib.util
import logging
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
