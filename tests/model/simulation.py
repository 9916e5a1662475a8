"""A simulation of time and threads. The threads of several workers run one at a time, in an order that a test chooses.

A simulated thread is an operating-system thread that runs only while the scheduler lets it. It stops when it waits
(for a lock, an event, the clock) and before each effect on the outside world (`Simulation.pause`). The clock moves only
if no thread can run, or if the test moves it. The same choices therefore always give the same history.

`simulated` replaces the parts of the standard library by which the worker waits and starts threads.
"""

from __future__ import annotations

import sys
import threading
import time as real_time
from collections import deque
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from queue import Empty, SimpleQueue
from types import FunctionType
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

START = 1_795_600_000.0  # seconds since the epoch: the time at which a simulation starts
STEP = 1e-4  # seconds that pass whenever a thread runs
MAX_SWITCHES = 20_000  # between two pauses; more mean that a thread loops without waiting
_PACKAGES = frozenset({"worker", "adapters", "tenacity"})


class Killed(BaseException):
    """The process of this thread was killed. The thread has no effects after that."""


class Process:
    """A process with its threads. Its errors are those that ended a thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_killed = False
        self.errors: list[BaseException] = []


class _Task:
    """A simulated thread. The scheduler lets it run until it waits or pauses."""

    def __init__(self, simulation: Simulation, process: Process, work: Callable[[], object]) -> None:
        self.process = process
        self.is_done = False
        self.is_ready: Callable[[], bool] = _always
        self.deadline: float | None = None  # when the wait ends without success
        self.is_paused = False
        self._simulation = simulation
        self._work = work
        self._turn = _closed_lock()
        threading.Thread(target=self._run, daemon=True).start()

    def can_run(self, now: float) -> bool:
        return self.is_ready() or (self.deadline is not None and self.deadline <= now)

    def run(self) -> None:
        """Run until the task waits, pauses or ends. Called by the scheduler."""
        self._simulation.now += STEP
        self._simulation.running = self
        self._turn.release()
        self._simulation.turn.acquire()
        self._simulation.running = None

    def wait_for_turn(self) -> None:
        """Give control back to the scheduler. Called by the task."""
        self._simulation.turn.release()
        self._turn.acquire()
        if self.process.is_killed:
            raise Killed

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self.process.is_killed:
                self._work()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - the test reads it
            self.process.errors.append(error)
        self.is_done = True
        self._simulation.turn.release()


class Simulation:
    """Time and the simulated threads of all processes."""

    current: Simulation | None = None  # the simulation that the replaced parts of the standard library belong to

    def __init__(self) -> None:
        self.now = 1_000.0  # monotonic seconds
        self.turn = _closed_lock()  # of the scheduler
        self.running: _Task | None = None
        self._tasks: list[_Task] = []
        Simulation.current = self

    def start(self, process: Process, work: Callable[[], object]) -> _Task:
        """Start a thread of a process."""
        task = _Task(self, process, work)
        self._tasks.append(task)
        return task

    def kill(self, process: Process) -> None:
        """End all threads of a process at once, as SIGKILL does."""
        process.is_killed = True
        for task in [task for task in self._tasks if task.process is process]:
            while not task.is_done:
                task.run()
        self._tasks = [task for task in self._tasks if task.process is not process]

    def close(self) -> None:
        """End all threads."""
        for process in {task.process for task in self._tasks}:
            self.kill(process)

    def wait(self, is_ready: Callable[[], bool], timeout: float | None = None, *, is_pause: bool = False) -> bool:
        """Let other threads run until `is_ready` returns True or `timeout` seconds have passed. Return `is_ready()`."""
        task = self.running
        if task is None:  # the test itself must not wait
            assert is_ready()
            return True
        if task.process.is_killed:
            raise Killed
        task.is_ready = is_ready
        task.deadline = None if timeout is None else self.now + max(timeout, 0.0)
        task.is_paused = is_pause
        task.wait_for_turn()
        return is_ready()

    def pause(self) -> None:
        """Let the test decide when this thread continues. Called before and after each effect on the outside world."""
        if self.running is not None:
            self.wait(_always, is_pause=True)

    def step(self, choice: int, until: float) -> bool:
        """Run all threads until all of them wait or pause. Then let the paused thread with this number continue.

        If none is paused, move the clock to the next deadline, but not beyond `until`. Return whether one continued.
        """
        for _ in range(MAX_SWITCHES):
            self._tasks = [task for task in self._tasks if not task.is_done]
            able = [task for task in self._tasks if task.can_run(self.now)]
            free = [task for task in able if not task.is_paused]
            if free:
                free[0].run()
            elif able:
                able[choice % len(able)].run()
                return True
            else:
                deadlines = [task.deadline for task in self._tasks if task.deadline is not None]
                if not deadlines or min(deadlines) > until:
                    return False
                self.now = max(self.now, min(deadlines))
        raise AssertionError("the threads never wait")


def _closed_lock() -> threading.Lock:
    """Return a lock that one thread releases to wake another that acquires it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _always() -> bool:
    return True


def _simulation() -> Simulation:
    assert Simulation.current is not None
    return Simulation.current


class Lock:
    """A threading.Lock, and a threading.RLock."""

    def __init__(self) -> None:
        self._owner: object = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        simulation = _simulation()
        me = simulation.running or simulation
        if self._owner not in {None, me} and not (
            blocking and simulation.wait(lambda: self._owner is None, None if timeout < 0 else timeout)
        ):
            return False
        self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self._owner = None

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """A threading.Condition."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock or Lock()
        self._waiting: list[list[bool]] = []  # whether each was notified
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def wait(self, timeout: float | None = None) -> bool:
        notified = [False]
        self._waiting.append(notified)
        self._lock.release()
        try:
            _simulation().wait(lambda: notified[0], timeout)
        finally:
            self._waiting = [each for each in self._waiting if each is not notified]
        self._lock.acquire()
        return notified[0]

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until = None if timeout is None else _simulation().now + timeout
        while not (result := predicate()):
            if not self.wait(None if until is None else until - _simulation().now):
                return predicate()
        return result

    def notify(self, n: int = 1) -> None:
        for notified in self._waiting[:n]:
            notified[0] = True

    def notify_all(self) -> None:
        self.notify(len(self._waiting))

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Event:
    """A threading.Event."""

    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._is_set or _simulation().wait(self.is_set, timeout)


class Thread:
    """A threading.Thread. It belongs to the process of the thread that starts it."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self.name = name or type(self).__name__
        self.daemon = daemon
        self._call = (target, tuple(args), kwargs or {})
        self._task: _Task | None = None

    def start(self) -> None:
        simulation = _simulation()
        assert simulation.running is not None
        self._task = simulation.start(simulation.running.process, self.run)

    def run(self) -> None:
        target, arguments, options = self._call
        if target:
            target(*arguments, **options)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_done

    def join(self, timeout: float | None = None) -> None:
        if self.is_alive():
            _simulation().wait(lambda: not self.is_alive(), timeout)


class Inbox:
    """A queue.SimpleQueue."""

    def __init__(self) -> None:
        self._entries: deque[Any] = deque()

    def put(self, entry: Any) -> None:
        self._entries.append(entry)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self._entries and not (block and _simulation().wait(lambda: bool(self._entries), timeout)):
            raise Empty
        return self._entries.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._entries

    def qsize(self) -> int:
        return len(self._entries)


class Future:
    """A concurrent.futures.Future."""

    def __init__(self) -> None:
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._is_done

    def set_result(self, result: Any) -> None:
        self._result, self._is_done = result, True

    def set_exception(self, error: BaseException) -> None:
        self._error, self._is_done = error, True

    def result(self, timeout: float | None = None) -> Any:
        if not self._is_done and not _simulation().wait(self.done, timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result


class Executor:
    """A concurrent.futures.ThreadPoolExecutor that runs each call immediately, in the calling thread."""

    def __init__(self, *_: object, **__: object) -> None:
        self._is_shut_down = False

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
        if self._is_shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:  # noqa: BLE001 - the future raises it
            future.set_exception(error)
        return future

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> Iterator[Any]:
        calls = [self.submit(function, *arguments) for arguments in zip(*iterables, strict=False)]
        return (future.result() for future in calls)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_shut_down = True


class Time:
    """The module `time`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(real_time, name)

    def monotonic(self) -> float:
        return Simulation.current.now if Simulation.current else real_time.monotonic()

    def clock_gettime(self, _clock: int) -> float:
        return self.monotonic()

    def time(self) -> float:
        return START + Simulation.current.now if Simulation.current else real_time.time()

    def sleep(self, seconds: float) -> None:
        _simulation().wait(lambda: False, seconds)


TIME = Time()


class Datetime(datetime):
    """The class `datetime.datetime`."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls.fromtimestamp(TIME.time(), tz)


def at(seconds: float) -> str:
    """Return a moment as commercetools writes it: `seconds` from now."""
    moment = datetime.fromtimestamp(TIME.time() + seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def simulated() -> Iterator[pytest.MonkeyPatch]:
    """Replace time and threads in all loaded modules of the worker, and in the library that retries its requests."""
    replacements: dict[int, object] = {
        id(original): replacement
        for original, replacement in (
            (threading.Thread, Thread),
            (threading.Event, Event),
            (threading.Condition, Condition),
            (threading.Lock, Lock),
            (threading.RLock, Lock),
            (SimpleQueue, Inbox),
            (futures.Future, Future),
            (futures.ThreadPoolExecutor, Executor),
            (real_time, TIME),
            (datetime, Datetime),
        )
    }
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in _PACKAGES]
    values = [(module, name, value) for module in modules for name, value in vars(module).items()]
    threads = {value for _, _, value in values if isinstance(value, type) and threading.Thread in value.__bases__}
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in values:
            if id(value) in replacements:
                patch.setattr(module, name, replacements[id(value)])
        for function in _functions(modules):
            _replace_defaults(patch, function)
        for thread in threads:
            thread.__bases__ = (Thread,)
        try:
            yield patch
        finally:
            Simulation.current = None
            for thread in threads:
                thread.__bases__ = (threading.Thread,)


def _functions(modules: Iterable[object]) -> set[FunctionType]:
    """Return the functions and methods of modules."""
    members = [value for module in modules for value in vars(module).values()]
    methods = [value for member in members if isinstance(member, type) for value in vars(member).values()]
    return {value for value in (*members, *methods) if isinstance(value, FunctionType)}


def _replace_defaults(patch: pytest.MonkeyPatch, function: FunctionType) -> None:
    """Replace the real clock where it is the default of a parameter."""
    clocks = {real_time.monotonic: TIME.monotonic, real_time.time: TIME.time}
    if any(each in clocks for each in function.__defaults__ or () if callable(each)):
        defaults = [clocks.get(each, each) if callable(each) else each for each in function.__defaults__ or ()]
        patch.setattr(function, "__defaults__", tuple(defaults))
