"""Starts the worker in forks of a process that has imported it: importing takes longer than most tests.

A fork calls the function that the installed command calls. `make test-wheel` runs the installed command itself.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tests.support.installed import COMMAND

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_MODULES = (
    "adapters.embedded",
    "adapters.pubsub.dead_letters",
    "adapters.push.queue",
    "adapters.servicebus.dead_letters",
    "adapters.sqs.dead_letters",
    "worker.cli",
    "worker.commands.check.checks",
    "worker.commands.dlq.replay",
    "worker.commands.subscriptions.destination",
    "worker.commands.transform.explain",
    "worker.service",
)
_ROOT = Path(__file__).parents[2]
_MAX_REQUEST = 100_000  # bytes


@dataclass(frozen=True, slots=True)
class _Request:
    arguments: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    files: Sequence[int]  # descriptors of standard input, output and error


class Process:
    """A worker in a fork, with the interface of subprocess.Popen."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], directory: Path, files: Sequence[IO[Any]]
    ) -> None:
        """`files`: standard input, output and error."""
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(shared().path)
        request = {"arguments": list(arguments), "environment": dict(environment), "directory": str(directory)}
        content = json.dumps(request).encode()
        sent = socket.send_fds(self._connection, [content], [file.fileno() for file in files])
        self._connection.sendall(content[sent:])
        self._connection.shutdown(socket.SHUT_WR)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or the negative number of the signal that ended the process.

        Raises subprocess.TimeoutExpired.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(COMMAND), timeout or 0.0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code; None if the process runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server in a process of its own. `path` names its socket."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fork-server-")
        self.path = str(Path(self._directory.name) / "socket")
        environment = os.environ | {"PYTHONPATH": str(_ROOT)}
        self._process = subprocess.Popen([sys.executable, __file__, self.path], env=environment)
        deadline = time.monotonic() + 60
        while not Path(self.path).exists():
            assert time.monotonic() < deadline, "the fork server did not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """End the server. The processes that it has started continue."""
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()


@dataclass(frozen=True, slots=True)
class RunningForkServer:
    """A server that another process has started."""

    path: str


_shared: list[ForkServer | RunningForkServer] = []


def share(path: str) -> None:
    """Use the running server at `path` in this process."""
    _shared.append(RunningForkServer(path))


def shared() -> ForkServer | RunningForkServer:
    """Return the server that all tests share. Without one, start it until this process ends."""
    if not _shared:
        server = ForkServer()
        atexit.register(server.kill)
        _shared.append(server)
    return _shared[0]


def _serve(path: str) -> _Request:
    """Fork a process per connection. Answer with its process id and, when it has ended, with its exit code.

    Return only in the forks, with the request.
    """
    connections: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{path}.new")
        listener.listen(64)
        Path(f"{path}.new").rename(path)
        ended = stack.enter_context(_signals_of_ended_children())
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if ended in ready:
                ended.recv(4096)
                _report_ended(connections)
            if listener in ready:
                connection, _ = listener.accept()
                request = _read_request(connection)
                if not (pid := os.fork()):
                    for each in (connection, *connections.values()):
                        each.close()
                    return request
                for file in request.files:
                    os.close(file)
                connections[pid] = connection
                connection.sendall(b"%d\n" % pid)


@contextmanager
def _signals_of_ended_children() -> Iterator[socket.socket]:
    """Give a socket that receives a byte when a child ends. A fork restores the default afterwards."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with receiver, sender:
        try:
            yield receiver
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


def _report_ended(connections: dict[int, socket.socket]) -> None:
    while connections:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with connections.pop(pid) as connection, suppress(OSError):  # the test has ended
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _read_request(connection: socket.socket) -> _Request:
    received, files, *_ = socket.recv_fds(connection, _MAX_REQUEST, 3)
    while chunk := connection.recv(_MAX_REQUEST):
        received += chunk
    return _Request(**json.loads(received), files=files)


def _become(request: _Request) -> None:
    """Give this process the files, the directory, the environment and the arguments of the request."""
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environment)
    time.tzset()
    sys.argv = [str(COMMAND), *request.arguments]


class _QuickExit:
    """Ends this process after all other exit handlers: to destroy what a fork has imported takes most of its CPU time.

    Exit handlers run in the reverse order of their registration, so this must be created first.
    """

    def __init__(self) -> None:
        self.code: Any = 1  # of an unexpected error
        atexit.register(self._end)

    def _end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code or 0)


if __name__ == "__main__":
    quick_exit = _QuickExit()
    for module in _MODULES:
        import_module(module)
    command = entry_points(group="console_scripts")["klaviyo-worker"].load()
    gc.freeze()
    _become(_serve(sys.argv[1]))
    try:
        command()
    except SystemExit as ended:
        quick_exit.code = ended.code
        raise
