"""A cluster of Ray on one machine, for the bench and the tests: each node has processes and a store of its own."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning_accel.async_sgd.ray_engine.cluster import LOOPBACK, closed_to_others

_STORE = 160 << 20  # bytes of shared memory of each node
# a node that is gone is missed after a second and a half, not after half a minute
_SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@contextlib.contextmanager
def simulated_nodes(nodes: int, *, store: int = _STORE) -> Iterator[Any]:
    """Yield a ``ray.cluster_utils.Cluster`` of so many nodes with one core each, on loopback and with a token.

    Args:
        nodes: How many, >= 1.
        store: Bytes of shared memory of each.
    """
    with closed_to_others():
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {
            "num_cpus": 1,
            "node_ip_address": LOOPBACK,
            "include_dashboard": False,
            "object_store_memory": store,
        }
        cluster = Cluster(initialize_head=True, head_node_args={**node, "_system_config": _SOON})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**node)
            yield cluster
        finally:
            cluster.shutdown()
