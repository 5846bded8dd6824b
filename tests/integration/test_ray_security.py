"""Who may talk to a run on Ray: loopback alone, with its token; whatever else comes is refused, and the run goes on."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.policy.encoding.wire import MalformedMessageError
from lightning_accel.async_sgd.policy.optimizer_copy import dumps
from lightning_accel.async_sgd.ray_engine.cluster import connected
from lightning_accel.async_sgd.ray_engine.head import Head, StrangerError
from lightning_accel.async_sgd.ray_engine.messages import pack_request
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.shards.shard import Shard
from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.ray_engine.worker_actor import Errand
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.store import Opening

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    with connected(RayOptions(), cores=1) as found:
        yield found


def own_processes():
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listening():
    """Return address and port of each socket of this run on which somebody listens, as the system's table has them."""
    inodes = set()
    for process in own_processes():
        for file in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                target = os.readlink(file)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


def shard_of_ray(ray):
    parameter = nn.Parameter(torch.zeros(3))
    opening = Opening(["weight"], [parameter], [], [], [torch.optim.SGD([parameter], lr=0.1)])
    shard = ray.remote(Shard).options(num_cpus=0).remote(Settings())
    ray.get(shard.open.remote(dumps(opening), 0, 0))
    return shard


def test_nothing_listens_outside_loopback(ray):
    shard = shard_of_ray(ray)
    found = listening()
    assert len(found) >= 4, "Ray's own ports, and those of its processes"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert {address for address, _ in found} <= loopback
    ray.kill(shard)


def test_random_bytes_to_every_open_port_do_no_harm(ray):
    shard = shard_of_ray(ray)
    generator = torch.Generator().manual_seed(0)
    before = ray.get(shard.read.remote())

    def noise(start):
        return start + torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator).numpy().tobytes()

    def send(port, data):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, contextlib.suppress(OSError):
            connection.sendall(data)  # or is thrown out
            connection.settimeout(0.2)
            connection.recv(4096)

    starts = (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n")
    sent = [(port, noise(start)) for _, port in listening() for start in starts]
    with ThreadPoolExecutor(8) as several:  # most get no answer, and wait for none beside each other
        list(several.map(lambda each: send(*each), sent))
    assert ray.get(shard.read.remote(), timeout=60) == before
    ray.kill(shard)


def test_who_has_another_token_or_none_is_refused(ray):
    shard = shard_of_ray(ray)
    address = ray.get_runtime_context().gcs_address
    program = f"import ray; ray.init(address={address!r}, logging_level='error'); print('inside')"
    changes = ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"})
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **new}, **told) for new in changes]
    ends = [process.communicate(timeout=300) for process in both]
    for process, (said, problem) in zip(both, ends, strict=True):
        assert process.returncode != 0
        assert "inside" not in said
        assert "Unauthenticated" in problem or "AuthenticationError" in problem, problem[-2000:]
    assert ray.get(shard.ping.remote(), timeout=60) is None
    ray.kill(shard)


def test_what_the_head_is_told_is_checked_and_the_head_goes_on(ray):
    errand = Errand([ray.put(b"")], Whereabouts.here())
    head = ray.remote(Head).options(num_cpus=0).remote(1, Settings(), RayOptions(), errand, "here")
    assert ray.get(head.look.remote())[0] is None
    with pytest.raises(StrangerError, match="does not take part"):
        ray.get(head.ask.remote(5, 0, pack_request(Message("statistics", {}))))
    running = head.run.remote()  # whose worker cannot read its task, and so ends the run
    deadline = time.monotonic() + 60
    for request in (b"", b"\0" * 1000, os.urandom(100), pack_request(Message("open", {}))):
        with pytest.raises((MalformedMessageError, StrangerError)):
            ray.get(head.ask.remote(0, 0, request))
    found = ray.get(running, timeout=max(1.0, deadline - time.monotonic()))
    assert "failed" in found or "error" in found
    ray.kill(head)
