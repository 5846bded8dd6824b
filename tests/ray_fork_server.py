"""Ray's worker processes forked from one that has imported torch and Lightning, which are seconds for each otherwise.

Ray starts a worker by a command. Inside of `forked_workers` this command is a small one: it asks a server, itself from
the fork server of these tests, to become that worker in a process of its own, and stays until that has ended. Tests of
clusters, of who may talk to a run and of the command line start Ray as it comes.
"""

import contextlib
import multiprocessing.connection
import os
import pickle
import runpy
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

PLACE = "LIGHTNING_ACCEL_TESTS_FORK_SERVER"  # in the environment: the server's socket


@contextlib.contextmanager
def forked_workers(monkeypatch):
    """Let each worker process of a Ray that is started inside be forked."""
    from ray._private import services

    plain = services.start_raylet
    default = os.path.join(os.path.dirname(services.__file__), "workers", "default_worker.py")

    def start_raylet(*args, **kwargs):
        assert default in args, "Ray starts its workers by another script now"
        return plain(*(__file__ if value == default else value for value in args), **kwargs)

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        path = f"{folder}/socket"
        listener.bind(path)
        listener.listen(64)
        server = multiprocessing.get_context("forkserver").Process(target=serve, args=(listener, default))
        server.start()
        monkeypatch.setattr(services, "start_raylet", start_raylet)
        monkeypatch.setenv(PLACE, path)
        try:
            yield
        finally:
            server.kill()
            server.join()


def serve(listener, script):
    """Fork a process for everybody who asks, as long as the process of the tests is there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    tests = multiprocessing.parent_process().sentinel
    while tests not in multiprocessing.connection.wait([listener, tests]):
        connection, _ = listener.accept()
        with connection:
            data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            if os.fork() == 0:
                listener.close()
                _become(script, connection, descriptors, pickle.loads(data))
            for descriptor in descriptors:
                os.close(descriptor)


def _become(script, connection, descriptors, wanted):
    """Be a process that was started by the command line of who has asked; never returns."""
    code = 1
    try:
        arguments, environment, search_path, folder = wanted
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = [script, *arguments]
        sys.path[:] = [str(Path(script).parent), *search_path]
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _end_with(connection):
    connection.recv(1)  # who has asked is gone, whom Ray knows
    os.kill(os.getpid(), signal.SIGKILL)


def ask():
    """Ask for a process with the arguments, environment and folder of this one, and wait for its end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ[PLACE])
        wanted = pickle.dumps((sys.argv[1:], dict(os.environ), sys.path[1:], os.getcwd()))
        socket.send_fds(connection, [wanted], [0, 1, 2])
        connection.recv(1)


if __name__ == "__main__":
    ask()
