"""Workers that set up alike and train apart: when ``prepare_data`` has ended, and with which random numbers."""

import pickle
import random
import sys
import time
from typing import Any

import torch

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.lightning_private import prepare_data_of

_KEY = "random states before setup"
_LOOK_SECONDS = 0.02


def set_up_alike(trainer: Any, store: ParameterStore) -> None:
    """Let ``setup`` of every worker begin when ``prepare_data`` of the coordinator has ended, with its random states.

    So a random split is the same in all workers, and that of a plain Trainer, which draws nothing before either. Should
    the coordinator die meanwhile, who takes over prepares the data.
    """
    prepared = store.is_coordinator
    while not prepared:
        found = store.kv(_KEY, wait=False)
        if found is not None:
            set_states(pickle.loads(found))
            return
        if store.stopped:
            return
        if store.is_coordinator:
            prepare_data_of(trainer)
            prepared = True
        else:
            time.sleep(_LOOK_SECONDS)
    first = store.kv(_KEY, pickle.dumps(get_states()))
    if store.incarnation > 0 and first is not None:
        set_states(pickle.loads(first))  # those that the others have


def draw_apart(store: ParameterStore) -> None:
    """Give every worker but the first, which draws as a plain run does, random numbers of its own: for dropout, say."""
    if not store.worker and not store.incarnation:
        return
    seed = int(torch.randint(2**31, ())) + 1009 * store.incarnation + store.worker
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def get_states() -> dict[str, Any]:
    """Return where the random numbers of torch, Python and numpy (if anyone has imported it) are."""
    numpy = sys.modules.get("numpy")
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": None if numpy is None else numpy.random.get_state(),
    }


def set_states(states: dict[str, Any]) -> None:
    """Let random numbers go on from there."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and states["numpy"] is not None:
        numpy.random.set_state(states["numpy"])
