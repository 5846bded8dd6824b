"""The machines of a simulation: cores, the server's thread and its link, as `Costs` describes them."""

from lightning_accel.async_sgd.simulation.clock import Clock, Cores, Queue, Then
from lightning_accel.async_sgd.simulation.costs import Costs


class Machines:
    """What workers and server share.

    Args:
        costs: Of the simulation.
    """

    def __init__(self, costs: Costs) -> None:
        self.clock = Clock()
        self.costs = costs
        self.cores = Cores(self.clock, costs.cores)
        self._thread = Queue(self.clock, self.cores)
        self._to_server, self._from_server = Queue(self.clock), Queue(self.clock)

    def call(self, seconds: float, then: Then) -> None:
        """Let the server do what takes it ``seconds``, once it has heard of it, and then call ``then``."""
        crowded = self.cores.all_busy_beside()
        self.clock.after(self.costs.message, lambda: self._thread.serve(seconds, then, crowded=crowded))

    def answer(self, then: Then) -> None:
        """Call ``then`` when a worker has heard from the server."""
        self.clock.after(self.costs.message, then)

    def send(self, then: Then) -> None:
        """Send a push to the server."""
        self._travel(self._to_server, self.costs.push_bytes, then)

    def fetch(self, read: Then, then: Then) -> None:
        """Read what the server has (``read``), and bring it to a worker; from shared memory it takes it itself."""

        def arrived() -> None:
            self.cores.run(self.costs.pull, then)

        def taken() -> None:
            read()
            then()

        def sent() -> None:
            read()
            self._travel(self._from_server, self.costs.pull_bytes, arrived)

        if self.costs.link == float("inf"):
            self.cores.run(self.costs.pull, taken)
        else:
            self.clock.after(self.costs.message, sent)

    def _travel(self, link: Queue, nbytes: int, then: Then) -> None:
        """Take turns on the server's link; with several shards the worker's own link is the slower one."""
        own = nbytes / self.costs.link
        shared = own / self.costs.shards
        link.serve(shared, lambda: self.clock.after(own - shared, then))

    def loads(self, seconds: float) -> tuple[float, float]:
        """Return which part of so many ``seconds`` the server was busy, and the busier direction of its link."""
        if seconds <= 0.0:
            return 0.0, 0.0
        link = max(self._to_server.seconds, self._from_server.seconds)
        return min(1.0, self._thread.seconds / seconds), min(1.0, link / seconds)
