"""A worker of a run as an actor: it runs what the caller wants with its end of the run in hand."""

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.settings import Settings


@dataclass(frozen=True)
class Errand:
    """What workers run, and where it comes from.

    Attributes:
        task: A list with a reference to the function and its arguments, packed by Ray's pickler.
        place: Of the caller.
    """

    task: list[Any]
    place: Whereabouts


class WorkerActor:
    """Run one worker. Ray gives each actor a process, and the main thread of it to its methods."""

    def run(self, head: Any, worker: int, incarnation: int, settings: Settings, errand: Errand) -> int:
        """Call the task's function with a store; returns 0, or 1 if it raised (which the head is told).

        Args:
            head: Of the run.
            worker: Number of this worker.
            incarnation: How often it was started before.
            settings: Of the run.
            errand: What to run.
        """
        import ray
        from ray import cloudpickle

        from lightning_accel.async_sgd.ray_engine.calls import HeadGoneError
        from lightning_accel.async_sgd.ray_engine.client import RayStore
        from lightning_accel.async_sgd.ray_engine.messages import pack_exception

        errand.place.follow()
        store = RayStore(head, worker, incarnation, settings)
        try:
            function, args = cloudpickle.loads(ray.get(errand.task[0]))
            result = cloudpickle.dumps(function(store, *args))
            coordinates = store.finish()
            store.report(result)
            store.leave(stop=coordinates)
        except HeadGoneError:
            os._exit(1)  # orphaned: nobody is left to report to
        except BaseException as exception:
            sys.stderr.flush()
            store.report_failure(pack_exception(exception), traceback.format_exc())
            return 1
        finally:
            store.close()
        return 0
