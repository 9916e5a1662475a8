"""Errors as exit codes, signals as a stop."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

import click

from adapters import QueueError, QueueURLError
from worker.errors import ExitCode, Misconfigured, SettingsError
from worker.json_access import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_STOP = frozenset({signal.SIGTERM, signal.SIGINT})


class CommandError(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(printable(message, keep="\n"))
        self.exit_code = exit_code  # type: ignore[misc] # click's own way, declared as a class variable


@contextmanager
def handle_errors() -> Iterator[None]:
    """Turn the errors an operator can act on into one line and an exit code."""
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


def exit_without_waiting(why: str) -> NoReturn:
    """Say why, and end at once: lanes may hang in calls that no thread can interrupt."""
    click.echo(f"Error: {why}", err=True)
    sys.stdout.flush()
    os._exit(ExitCode.SHUTDOWN_TIMED_OUT)


def on_signals(stop: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT call `stop`, in a thread: a handler in the main thread could meet a lock it holds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # before any thread starts: all inherit it
    Thread(target=_wait_for_signals, args=(stop,), daemon=True).start()


def _wait_for_signals(stop: Callable[[], None]) -> None:
    while True:
        signal.sigwait(_STOP)
        stop()
