"""The end of a command: exit codes for errors, and signal handling."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

from adapters import QueueError, QueueURLError
from worker.errors import ExitCode, Misconfigured, SettingsError
from worker.json_access import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


EXECUTOR_NAME = "klaviyo"  # the names of all threads of executors start with it
EXIT_TIMEOUT = 1.0  # seconds for which the end of the process waits for the threads of executors
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


class CommandError(click.ClickException):
    """An error that ends the command with one line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(printable(message, keep="\n"))
        self.exit_code = exit_code  # type: ignore[misc] # click declares it as a class variable


@contextmanager
def handle_errors() -> Iterator[None]:
    """Convert errors that an operator can fix into one line on stderr and an exit code."""
    try:
        yield
    except (SettingsError, QueueURLError) as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    except QueueError as error:
        raise CommandError(str(error), ExitCode.QUEUE) from None
    except Misconfigured as error:
        raise CommandError(str(error), error.exit_code) from None
    except KeyboardInterrupt:
        raise CommandError("interrupted", ExitCode.INTERRUPTED) from None


def exit_without_waiting(reason: str) -> NoReturn:
    """Print the reason and exit immediately. Lanes can hang in calls that no other thread can interrupt."""
    click.echo(f"Error: {reason}", err=True)
    sys.stdout.flush()
    os._exit(ExitCode.UNFINISHED)


def run_process(command: Callable[[], object]) -> NoReturn:
    """Run the command of this process, and end the process even if threads hang in calls.

    Python waits for the threads of executors at exit, however long their calls take.
    """
    code: object = ExitCode.UNEXPECTED
    try:
        command()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - printed like Python does it
        sys.excepthook(*sys.exc_info())
    deadline = time.monotonic() + EXIT_TIMEOUT
    executors = [thread for thread in threading.enumerate() if thread.name.startswith(EXECUTOR_NAME)]
    for thread in executors:
        thread.join(max(deadline - time.monotonic(), 0.0))
    if any(thread.is_alive() for thread in executors):
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else ExitCode.UNEXPECTED)
    sys.exit(code)  # type: ignore[arg-type] # as the command did


def on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGTERM and SIGINT, in a thread: a signal handler could wait for a lock of the main thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # threads that start later inherit this
    threading.Thread(target=_wait_for_signals, args=(stop,), daemon=True).start()


def _wait_for_signals(stop: Callable[[], None]) -> None:
    while True:
        signal.sigwait(_STOP_SIGNALS)
        stop()
